"""Where a run starts from: the loop's view of loading a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from megatron_moe.checkpoint import (
    RunIdentity,
    TrainState,
    has_checkpoint,
    load_checkpoint,
)
from megatron_moe.checkpoint.select import SelectedCheckpoint, choose
from megatron_moe.config import RunConfig
from megatron_moe.config.run import flag_of
from megatron_moe.data.pipeline import Data
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.training.consumed import (
    KEY,
    PhaseRecord,
    check_consumed,
    previous_settings,
    recorded,
)
from megatron_moe.training.phases import RunSchedule, differences
from megatron_moe.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a run begins, or goes on."""

    state: TrainState
    records: tuple[PhaseRecord, ...] = ()
    """The stages that took the steps so far; none at the beginning."""
    before: RunConfig | None = None
    """The saved run's configuration, if this one goes on with it."""
    chosen: SelectedCheckpoint | None = None
    """The checkpoint to load, if any."""
    metadata: RunIdentity | None = None
    """Its vocabulary, tokenizer and data."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why newer checkpoints are not loaded, one line each."""
        return () if self.chosen is None else self.chosen.skipped


def resolve_resume_point(schedule: RunSchedule, ranks: RankGroup | None = None) -> ResumePoint:
    """Step and sample to go on from, read before anything else is built; called by all ranks.

    Args:
        schedule: the stages and settings of the run.
        ranks: those of the launch: one reads and tells the others. By default this one is alone.

    Raises:
        UsageError: on every rank: `--load` names no checkpoint or a damaged one, or the stages
            contradict what it has done. Only `--allow-missing-load` makes an empty directory mean
            step 0.
    """
    settings, ranks = schedule.config.checkpoint, ranks or RankGroup()
    if settings.load is None:
        return ResumePoint(state=TrainState())
    may_miss = settings.allow_missing_load and ranks.rank == 0
    if ranks.broadcast(may_miss and not has_checkpoint(settings.load)):
        return ResumePoint(state=TrainState())
    chosen, opened = choose(
        settings.load, settings.ckpt_step, fallback=settings.checkpoint_fallback, ranks=ranks
    )
    if settings.finetune:
        return ResumePoint(state=TrainState(), chosen=chosen, metadata=opened.metadata)
    records = recorded(opened.train, opened)
    check_consumed(schedule, opened.train, records)
    return ResumePoint(
        state=opened.train,
        records=records,
        before=opened.config,
        chosen=chosen,
        metadata=opened.metadata,
    )


def changed_settings(schedule: RunSchedule, start: ResumePoint) -> list[str]:
    """What differs from the run that saved the checkpoint, one line each; for the log.

    The learning rate is a function of the settings and the step, so a changed length or rate takes
    effect at once; whoever goes on should see that. What must not differ is refused by the load.
    Of a stage table, the stage under way is compared; a stage that begins now says so itself.
    """
    if start.before is None:
        return []
    if not _by_stages(schedule, start):
        return _changes(start.before, schedule.config)
    stage, last = schedule.at(start.state.iteration), start.records[-1]
    if stage.first_iteration != last.first_iteration:
        return []
    return differences(previous_settings(last, str(schedule.config.checkpoint.load)), stage.config)


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


def _by_stages(schedule: RunSchedule, start: ResumePoint) -> bool:
    """Whether what was consumed is known by stages, and was compared so."""
    return schedule.has_phases or KEY in start.state.extra


def load_run(run: TrainingRun, data: Data, schedule: RunSchedule, start: ResumePoint) -> None:
    """Put the checkpoint's weights, and unless told otherwise moments and random states, in place.

    Raises:
        UsageError: on every rank: the checkpoint is damaged or of another model or data.
    """
    settings = schedule.config.checkpoint
    if settings.load is None or start.chosen is None:
        return
    config, metadata = schedule.config, metadata_of(run, data)
    before = start.metadata
    if start.before is not None and before is not None and _by_stages(schedule, start):
        # Length of rows and data belong to stages, and were held against the records.
        length = start.before.data.seq_length
        config = replace(config, data=replace(config.data, seq_length=length))
        metadata = replace(metadata, data_fingerprint=before.data_fingerprint)
    fresh = settings.finetune
    load_checkpoint(
        settings.load,
        config=config,
        ctx=run.ctx,
        chunks=run.wrapped,
        optimizer=run.optimizer,
        chosen=start.chosen,
        with_optimizer=not (fresh or settings.no_load_optim),
        with_rng=not (fresh or settings.no_load_rng),
        metadata=metadata,
    )


def metadata_of(run: TrainingRun, data: Data) -> RunIdentity:
    """What a run must share with the checkpoint that it goes on from."""
    return RunIdentity(
        padded_vocab_size=run.vocab_size,
        tokenizer_hash=str(data.identity["tokenizer"]),
        data_fingerprint=data.fingerprint,
    )
