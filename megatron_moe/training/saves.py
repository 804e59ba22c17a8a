"""What a run leaves to go on from: the loop's view of saving checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from megatron_moe.checkpoint import TrainState
from megatron_moe.checkpoint.background import BackgroundSaves
from megatron_moe.checkpoint.directory import prune
from megatron_moe.checkpoint.save import contents_of, ranks_of
from megatron_moe.checkpoint.writer import write_checkpoint
from megatron_moe.config import CheckpointConfig
from megatron_moe.data.pipeline import Data
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.training.consumed import PhaseRecord, to_extra
from megatron_moe.training.phases import RunSchedule
from megatron_moe.training.resume import metadata_of
from megatron_moe.training.run import TrainingRun


class Saves:
    """The saves of a run, synchronous or not; all ranks call each method together.

    Args:
        schedule: the run's stages and settings.
        ctx: this rank's place in the layout.
        say: prints a line of the log.
    """

    def __init__(
        self, schedule: RunSchedule, ctx: ParallelContext, say: Callable[[str], None]
    ) -> None:
        settings = schedule.config
        self._schedule, self._say = schedule, say
        self._ranks = ranks_of(ctx)
        self._background: BackgroundSaves | None = None
        if settings.checkpoint.async_save:
            minutes = settings.parallel.distributed_timeout_minutes
            self._ranks = host_ranks(ctx, timedelta(minutes=minutes))
            self._background = BackgroundSaves(self._ranks, ctx.platform.kind == "cuda")

    def save(
        self, run: TrainingRun, data: Data, state: TrainState, records: Sequence[PhaseRecord]
    ) -> None:
        """Save the run as it stands after ``state.iteration`` steps, or begin to.

        Args:
            run: the run.
            data: of the stage that took the last step.
            state: how far it is.
            records: of the stages that have begun.

        Raises:
            CheckpointError: on every rank: this save failed, or the one before it.
        """
        settings, step = self._schedule.config.checkpoint, state.iteration
        assert settings.save is not None
        state = replace(state, extra=to_extra(records) if self._schedule.has_phases else {})
        self.finish()
        contents = contents_of(
            state,
            config=self._schedule.config,
            ctx=run.ctx,
            chunks=run.wrapped,
            optimizer=None if settings.no_save_optim else run.optimizer,
            metadata=metadata_of(run, data),
            with_rng=not settings.no_save_rng,
            ranks=self._ranks,
        )
        if self._background is not None:
            self._background.start(settings.save, step, contents, lambda: _prune(settings, step))
            return
        path = write_checkpoint(settings.save, step, ranks=self._ranks, **vars(contents))
        if self._ranks.rank == 0:
            _prune(settings, step)
        self._say(f" saved iteration {step} to {path}")

    def poll(self) -> None:
        """After a step: say so if the save under way is complete.

        Raises:
            CheckpointError: on every rank: it failed.
        """
        if self._background is not None:
            self._tell(self._background.step, self._background.poll())

    def finish(self) -> None:
        """Wait for the save under way; raises as `poll`."""
        if self._background is not None:
            self._tell(self._background.step, self._background.finish())

    def abandon(self) -> None:
        """The run ends by an error: do not wait for the save under way."""
        if self._background is not None:
            self._background.abandon()

    def _tell(self, step: int | None, path: Path | None) -> None:
        if path is not None:
            self._say(f" saved iteration {step} to {path}, while training went on")


def host_ranks(ctx: ParallelContext, timeout: timedelta) -> RankGroup:
    """All ranks, over a group of their own on the host; called by all ranks together."""
    if ctx.world_size == 1:
        return RankGroup(ctx.rank, 1)
    group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return RankGroup(ctx.rank, ctx.world_size, group=group)


def _prune(settings: CheckpointConfig, step: int) -> None:
    """Remove what `--keep-last` does not keep; called by one rank."""
    if settings.save is None or settings.keep_last is None:
        return
    try:
        prune(settings.save, step, settings.keep_last, settings.keep_every)
    except OSError as error:
        # Too many checkpoints are no reason to end a run.
        warnings.warn(f"old checkpoints of {settings.save} stay: {error}", stacklevel=2)
