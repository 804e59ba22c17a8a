"""Where a run starts from, and what it leaves to go on from: the loop's view of checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_moe.checkpoint import (
    Metadata,
    TrainState,
    has_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from megatron_moe.checkpoint.directory import step_directory
from megatron_moe.checkpoint.reading import open_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.data.pipeline import Data
from megatron_moe.errors import UsageError
from megatron_moe.training.run import TrainingRun


def starting_point(config: RunConfig) -> TrainState:
    """Step and sample to go on from, read before anything else is built.

    Raises:
        UsageError: `--load` names no checkpoint or a damaged one. Only `--allow-missing-load` makes
            an empty directory mean step 0.
    """
    settings = config.checkpoint
    if settings.load is None:
        if settings.finetune:
            raise UsageError("--finetune", True, "--load with it")
        return TrainState()
    if _nothing_to_load(config):
        return TrainState()
    _, path = step_directory(settings.load, settings.ckpt_step)
    state = open_checkpoint(path).train
    return TrainState() if settings.finetune else state


def changed_settings(config: RunConfig) -> list[str]:
    """What differs from the run that saved the checkpoint, one line each; for the log.

    The learning rate is a function of the settings and the step, so a changed length or rate takes
    effect at once; whoever goes on should see that. What must not differ is refused by the load.
    """
    settings = config.checkpoint
    if settings.load is None or settings.finetune or _nothing_to_load(config):
        return []
    before = read_config(settings.load, settings.ckpt_step)
    found = []
    for section in ("model", "moe", "data", "train", "optimizer"):
        old, new = asdict(getattr(before, section)), asdict(getattr(config, section))
        found += [
            f"--{name.replace('_', '-')} was {old[name]}, is {new[name]}"
            for name in new
            if old[name] != new[name]
        ]
    return found


def load_run(run: TrainingRun, data: Data) -> None:
    """Put the checkpoint's weights, and unless told otherwise moments and random states, in place.

    Raises:
        UsageError: on every rank: the checkpoint is damaged or of another model or data.
    """
    settings = run.config.checkpoint
    if settings.load is None or _nothing_to_load(run.config):
        return
    fresh = settings.finetune
    load_checkpoint(
        settings.load,
        config=run.config,
        ctx=run.ctx,
        chunks=run.wrapped,
        optimizer=run.optimizer,
        step=settings.ckpt_step,
        with_optimizer=not (fresh or settings.no_load_optim),
        with_rng=not (fresh or settings.no_load_rng),
        metadata=_metadata(run, data),
    )


def save_run(run: TrainingRun, data: Data, state: TrainState) -> Path:
    """Save the run as it stands after ``state.iteration`` steps; returns where."""
    settings = run.config.checkpoint
    assert settings.save is not None
    return save_checkpoint(
        settings.save,
        state,
        config=run.config,
        ctx=run.ctx,
        chunks=run.wrapped,
        optimizer=run.optimizer,
        metadata=_metadata(run, data),
        with_optimizer=not settings.no_save_optim,
        with_rng=not settings.no_save_rng,
    )


def _nothing_to_load(config: RunConfig) -> bool:
    settings = config.checkpoint
    assert settings.load is not None
    return settings.allow_missing_load and not has_checkpoint(settings.load)


def _metadata(run: TrainingRun, data: Data) -> Metadata:
    return Metadata(
        padded_vocab_size=run.vocab_size,
        tokenizer_hash=str(data.identity["tokenizer"]),
        data_fingerprint=data.fingerprint,
    )
