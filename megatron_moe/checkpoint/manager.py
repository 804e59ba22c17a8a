"""Save checkpoints: one, or those of a run, one at a time, of which some are kept.

This is the entry: `contents.py` collects what a rank saves, `save.py` writes and commits it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron_moe.checkpoint.contents import all_ranks, collect_contents
from megatron_moe.checkpoint.directory import prune, remove
from megatron_moe.checkpoint.metadata import RunIdentity, TrainState
from megatron_moe.checkpoint.save import PendingSave, start_save
from megatron_moe.checkpoint.tensor_files import HostMemory
from megatron_moe.config import CheckpointConfig, RunConfig
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext


def save_checkpoint(
    directory: str | Path,
    state: TrainState,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    identity: RunIdentity,
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> Path:
    """Save a run synchronously; called by all ranks together.

    Args:
        directory: of the run's checkpoints, on a file system that all ranks share.
        state: the run's progress; ``state.iteration`` names the step.
        config: the run's configuration.
        ctx: this rank's place in the layout.
        chunks: model chunks of this rank, in Megatron-Core's wrappers or bare.
        optimizer: Megatron-Core's, or None together with ``with_optimizer=False``.
        identity: what a run that loads this must share with it.
        with_optimizer: save optimizer state.
        with_rng: save random states.

    Returns:
        The new checkpoint's directory, once it is complete and the tracker names it.

    Raises:
        NonFinite: on every rank, if a tensor is not finite.
        CheckpointError: on every rank, if any failed, e.g. because the disk is full. Existing
            checkpoints and the tracker are unchanged.
    """
    ranks = all_ranks(ctx)
    contents = collect_contents(
        state,
        config=config,
        ctx=ctx,
        chunks=chunks,
        optimizer=optimizer if with_optimizer else None,
        identity=identity,
        with_rng=with_rng,
        ranks=ranks,
    )
    return start_save(directory, state.iteration, contents, ranks).finish()


class CheckpointManager:
    """Saves a run, with `--async-save` while training continues; at most one save at a time.

    All ranks call the constructor and each method but `abandon` together.

    Args:
        config: the run's configuration; ``config.checkpoint`` says where and what to save.
        ctx: this rank's place in the layout.
        log: prints a line of the log.
        tokenizer_files: file name -> content, stored in every checkpoint, so that its directory is
            all that its use requires.
        replaced: checkpoints of another run in the same directory, for rank 0. They are removed
            once the first save of this run is complete, so that there always is a complete one.
        check_writer: raises if another run has taken the directory over, see `WriterLock.check`.
    """

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        log: Callable[[str], None],
        tokenizer_files: Mapping[str, bytes] = MappingProxyType({}),
        replaced: Sequence[Path] = (),
        check_writer: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._ctx, self._log = config, ctx, log
        self._check_writer = check_writer
        self._tokenizer_files, self._replaced = tokenizer_files, list(replaced)
        self._pending: PendingSave | None = None
        self._memory: HostMemory | None = None
        self._ranks = all_ranks(ctx)
        self.saving = False
        """Whether a save is in progress: from its first copy until the tracker names it."""
        if config.checkpoint.async_save:
            # A group of its own, so that no poll waits for a device or for training's messages.
            minutes = config.parallel.distributed_timeout_minutes
            self._ranks = host_rank_group(ctx, timedelta(minutes=minutes))
            self._memory = HostMemory(pinned=ctx.platform.kind == "cuda")

    def save(
        self, state: TrainState, *, chunks: Sequence[Any], optimizer: Any, identity: RunIdentity
    ) -> None:
        """Save the run as it is after ``state.iteration`` steps, or start to.

        Args:
            state: the run's progress.
            chunks: model chunks of this rank, in Megatron-Core's wrappers.
            optimizer: Megatron-Core's.
            identity: what a run that loads this must share with it.

        Raises:
            NonFinite: on every rank: weights or optimizer state hold NaN or infinity. Nothing is
                written, and neither the tracker nor any checkpoint changes.
            CheckpointError: on every rank: this save failed, or the one before it.
        """
        settings, step = self._config.checkpoint, state.iteration
        assert settings.save is not None
        self.finish()
        self.saving = True
        try:
            contents = collect_contents(
                state,
                config=self._config,
                ctx=self._ctx,
                chunks=chunks,
                optimizer=None if settings.no_save_optim else optimizer,
                identity=identity,
                with_rng=not settings.no_save_rng,
                ranks=self._ranks,
                tokenizer_files=self._tokenizer_files,
            )
            self._pending = start_save(
                settings.save,
                step,
                contents,
                self._ranks,
                memory=self._memory,
                on_commit=lambda: _remove_old(settings, step, self._replaced),
                check_writer=self._check_writer,
            )
        except BaseException:
            self.saving = False
            raise
        if self._memory is None:
            self.finish()

    def poll(self) -> None:
        """After a step: log the save in progress if it is complete.

        Raises:
            CheckpointError: on every rank: it failed.
        """
        self._advance(wait=False)

    def finish(self) -> None:
        """Wait for the save in progress, if any; raises as `poll`."""
        self._advance(wait=True)

    def abandon(self) -> None:
        """Do not wait for the save in progress, because the run ends by an error."""
        if self._pending is not None:
            self._pending.abandon()
            self._pending, self.saving = None, False

    def _advance(self, wait: bool) -> None:
        pending = self._pending
        if pending is None:
            return
        try:
            path = pending.finish() if wait else pending.poll()
        finally:
            if pending.done:
                self._pending, self.saving = None, False
        if path is not None:
            how = "" if self._memory is None else " asynchronously"
            self._log(f" saved iteration {pending.step} to {path}{how}")


def host_rank_group(ctx: ParallelContext, timeout: timedelta) -> RankGroup:
    """All ranks of the run, over a new gloo group on the hosts; called by all ranks together."""
    if ctx.world_size == 1:
        return RankGroup(ctx.rank, 1)
    group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return RankGroup(ctx.rank, ctx.world_size, group=group)


def _remove_old(settings: CheckpointConfig, step: int, replaced: list[Path]) -> None:
    """Remove ``replaced``, and steps that `--keep-last` does not keep.

    On rank 0, after the save of ``step``.
    """
    if settings.save is None:
        return
    try:
        while replaced:
            path = replaced.pop()
            if path.exists():  # not if this save was of the same step
                remove(path)
        if settings.keep_last is not None:
            prune(settings.save, step, settings.keep_last, settings.keep_every)
    except OSError as error:
        # Too many checkpoints are no reason to end a run.
        message = f"could not remove old checkpoints of {settings.save}: {error}"
        warnings.warn(message, stacklevel=2)
