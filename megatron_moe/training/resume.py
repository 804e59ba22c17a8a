"""Where a run starts: at step 0, from the weights of a checkpoint, or where a checkpoint ended.

`resolve_resume_point` reads the checkpoint's metadata before data and model are built, because both
depend on the step; `load_run` fills the built model and optimizer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_moe.checkpoint import (
    RunIdentity,
    TrainState,
    has_checkpoint,
    load_checkpoint,
)
from megatron_moe.checkpoint.foreign import reject_foreign
from megatron_moe.checkpoint.select import SelectedCheckpoint, select_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.config.phases import RATES
from megatron_moe.config.run import flag_of
from megatron_moe.data.identity import data_differences
from megatron_moe.data.pipeline import Data
from megatron_moe.errors import UsageError
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.tokenizer.base import vocabulary_of
from megatron_moe.training.consumed import (
    DATA,
    PhaseRecord,
    check_consumed,
    has_records,
    previous_settings,
    recorded,
)
from megatron_moe.training.phases import RunSchedule, differences, resolve_run_schedule
from megatron_moe.training.plan import counts_samples, resolve_plan
from megatron_moe.training.run import TrainingRun

_UNKNOWN_TOKENIZER = (
    " the checkpoint does not record its tokenizer: this run's is accepted, and recorded by saves"
)


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The step at which training starts, and the checkpoint that it is loaded from."""

    state: TrainState
    records: tuple[PhaseRecord, ...] = ()
    """The phases that took the steps so far; none at the beginning."""
    before: RunConfig | None = None
    """The saved run's configuration, if this run resumes it."""
    chosen: SelectedCheckpoint | None = None
    """The checkpoint to load, if any."""
    metadata: RunIdentity | None = None
    """Its vocabulary, tokenizer and data."""


def resolve_resume_point(schedule: RunSchedule, ranks: RankGroup | None = None) -> ResumePoint:
    """Find the step and sample to resume from; called by all ranks together.

    Args:
        schedule: the phases and settings of the run.
        ranks: the ranks of the launch: rank 0 reads and broadcasts, so that a thousand ranks do
            not list one directory. By default this rank is the only one.

    Raises:
        UsageError: on every rank: `--load` names no checkpoint or a damaged one, or the phases
            contradict its completed steps. A directory without weights of any format means step 0
            only with `--allow-missing-load`.
    """
    settings, ranks = schedule.config.checkpoint, ranks or RankGroup()
    if settings.load is None:
        return ResumePoint(state=TrainState())
    directory, may_miss = Path(settings.load), settings.allow_missing_load and ranks.rank == 0

    def starts_anew() -> bool:
        if not may_miss or has_checkpoint(directory):
            return False
        reject_foreign(directory)
        return True

    if ranks.broadcast(ranks.run_on_all(starts_anew)):
        return ResumePoint(state=TrainState())
    chosen, opened = select_checkpoint(
        settings.load, settings.ckpt_step, fallback=settings.checkpoint_fallback, ranks=ranks
    )
    if settings.finetune:
        return ResumePoint(state=TrainState(), chosen=chosen, metadata=opened.identity)
    records = recorded(opened.train, opened)
    check_consumed(schedule, opened.train, records)
    return ResumePoint(
        state=opened.train,
        records=records,
        before=opened.config,
        chosen=chosen,
        metadata=opened.identity,
    )


def with_saved_rates(
    schedule: RunSchedule, resume: ResumePoint, world_size: int, padded_vocab_size: int
) -> RunSchedule:
    """The schedule with the checkpoint's learning rates, with the flag that asks for them.

    As Megatron-LM's `--use-checkpoint-opt_param-scheduler`: the saved lengths hold, also if this
    run is longer than the one that saved. A run from step 0 has the rates of the flags.

    Args:
        schedule: of the flags, without phases.
        resume: the checkpoint.
        world_size: ranks.
        padded_vocab_size: V.

    Raises:
        UsageError: the saved warm-up is a fraction of steps, and this run counts sequences.
    """
    config, before = schedule.config, resume.before
    if not config.checkpoint.use_checkpoint_opt_param_scheduler or before is None:
        return schedule
    saved = before.optimizer
    rates = {name: getattr(saved, name) for name in (*RATES, "weight_decay")}
    if counts_samples(before):
        rates["lr_decay_samples"] = saved.lr_decay_samples or before.train.train_samples
    elif saved.lr_warmup_fraction is not None and config.train.train_samples is not None:
        expected = "unset: the warm-up of the checkpoint is a fraction of steps"
        raise UsageError(
            "--train-samples", config.train.train_samples, expected, "use --train-iters"
        )
    elif saved.lr_decay_iters is None:
        batch = before.train.global_batch_size or schedule.phases[0].layout.global_batch_size
        rates["lr_decay_iters"] = resolve_plan(before, batch).rate.decay
    optimizer = replace(config.optimizer, **rates)
    return resolve_run_schedule(replace(config, optimizer=optimizer), world_size, padded_vocab_size)


def resume_lines(schedule: RunSchedule, resume: ResumePoint) -> list[str]:
    """For the log: which checkpoints were skipped and why, and which settings changed."""
    load = schedule.config.checkpoint.load
    if load is not None and resume.chosen is None:
        return [f" no checkpoint in {load}: starting from step 0 with new weights"]
    skipped = () if resume.chosen is None else resume.chosen.skipped
    unknown = resume.metadata is not None and not resume.metadata.tokenizer_hash
    return [
        *([_UNKNOWN_TOKENIZER] if unknown else []),
        *(f" WARNING: {line}" for line in skipped),
        *(f" since the checkpoint: {line}" for line in _changed_settings(schedule, resume)),
    ]


def _changed_settings(schedule: RunSchedule, resume: ResumePoint) -> list[str]:
    """What differs from the run that saved the checkpoint, one line each.

    The learning rate is a function of the settings and the step, so a changed length or rate takes
    effect at once, and the log must show it. Settings that must not differ are rejected by
    `load_run`. In a run with phases the current phase is compared; a phase that begins now logs
    its changes itself.
    """
    if resume.before is None:
        return []
    if not _by_phases(schedule, resume):
        return _changes(resume.before, schedule.config)
    phase, last = schedule.at(resume.state.iteration), resume.records[-1]
    if phase.first_iteration != last.first_iteration:
        return []
    return differences(previous_settings(last, str(schedule.config.checkpoint.load)), phase.config)


def _changes(before: RunConfig, after: RunConfig) -> list[str]:
    found = []
    for section in ("model", "moe", "data", "train", "optimizer"):
        old, new = asdict(getattr(before, section)), asdict(getattr(after, section))
        found += [
            f"{flag_of(name)} was {old[name]}, is {new[name]}"
            for name in new
            if old[name] != new[name]
        ]
    return found


def _by_phases(schedule: RunSchedule, resume: ResumePoint) -> bool:
    """Whether consumed samples were compared by phase, instead of by the run's one data set."""
    return schedule.has_phases or has_records(resume.state)


def load_run(run: TrainingRun, data: Data, schedule: RunSchedule, resume: ResumePoint) -> None:
    """Load the checkpoint's weights and, as configured, optimizer state and random states.

    Raises:
        UsageError: on every rank: the checkpoint is damaged, or of another model or data.
    """
    settings = schedule.config.checkpoint
    if settings.load is None or resume.chosen is None:
        return
    config, metadata = schedule.config, identity_of(run, data)
    before = resume.metadata
    if resume.before is not None and before is not None and _by_phases(schedule, resume):
        # Sequence length and data belong to phases. They were compared with the records, so the
        # comparison with the checkpoint's own values, which may be another phase's, must pass.
        length = resume.before.data.seq_length
        config = replace(config, data=replace(config.data, seq_length=length))
        metadata = replace(metadata, data_fingerprint=before.data_fingerprint)
    differences: tuple[str, ...] = ()
    if before is not None and before.data_fingerprint != metadata.data_fingerprint:
        saved, now = resume.state.extra.get(DATA), before.data_fingerprint
        differences = tuple(data_differences(saved, data.described, now))
    fresh = settings.finetune
    load_checkpoint(
        settings.load,
        config=config,
        ctx=run.ctx,
        chunks=run.wrapped,
        optimizer=run.optimizer,
        selected=resume.chosen,
        with_optimizer=not (fresh or settings.no_load_optim),
        with_rng=not (fresh or settings.no_load_rng),
        identity=metadata,
        data_differences=differences,
    )


def identity_of(run: TrainingRun, data: Data) -> RunIdentity:
    """What a run must share with the checkpoint that it resumes from."""
    return RunIdentity(
        padded_vocab_size=run.vocab_size,
        tokenizer_hash=vocabulary_of(str(data.identity["tokenizer"])),
        data_fingerprint=data.fingerprint,
    )
