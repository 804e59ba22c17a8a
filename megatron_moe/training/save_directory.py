"""The directory of `--save`: who writes to it, and whose checkpoints are in it at the start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moe.checkpoint.directory import TRACKER, has_checkpoint, revisions
from megatron_moe.checkpoint.lock import WriterLock
from megatron_moe.config import CheckpointConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.training.log import print_line

_SHOWN = 5
"""Steps that an error lists."""


def continues_save(settings: CheckpointConfig) -> bool:
    """Whether a run resumes the checkpoints of `--save`, however the two paths are written.

    With `--finetune` it does not: it takes the weights and starts at step 0.
    """
    if settings.save is None or settings.load is None or settings.finetune:
        return False
    return os.path.realpath(settings.save) == os.path.realpath(settings.load)


@contextmanager
def only_writer(
    settings: CheckpointConfig, ranks: RankGroup | None = None
) -> Iterator[Callable[[], None]]:
    """Hold the lock of `--save`, if the run saves; all ranks enter together, rank 0 holds it.

    Yields:
        Raises if another run has taken the lock over meanwhile; for rank 0.

    Raises:
        UsageError: on every rank: another run writes there, or the lock cannot be written.
    """
    ranks = ranks or RankGroup()
    holds = settings.save is not None and ranks.rank == 0
    lock = WriterLock(str(settings.save)) if holds else None

    def acquire() -> None:
        if lock is None:
            return
        try:
            lock.acquire(print_line)
        except OSError as error:
            expected = "a writable directory with free space"
            raise UsageError("--save", settings.save, expected, str(error)) from None

    try:
        ranks.run_on_all(acquire)
        yield lock.check if lock is not None else _no_check
    finally:
        if lock is not None:
            lock.release()


def _no_check() -> None:
    """For a rank or a run that holds no lock."""


def check_save_directory(settings: CheckpointConfig, ranks: RankGroup | None = None) -> list[Path]:
    """Check that a run does not save among the checkpoints of another one.

    A run that starts at step 0, or from other checkpoints, would replace steps of the same number
    and leave the rest, so that the directory holds steps of two runs.

    Args:
        settings: `--save`, `--load` and `--save-overwrite`.
        ranks: the ranks of the launch, which call this together: rank 0 reads the directory.

    Returns:
        On rank 0 with `--save-overwrite`, the checkpoints that this run replaces, see
        `CheckpointManager`; else nothing.

    Raises:
        UsageError: on every rank: the directory has checkpoints that this run does not resume, and
            no flag says that it replaces them; or the flags contradict each other.
    """
    ranks = ranks or RankGroup()
    found = ranks.run_on_all(lambda: _replaced(settings) if ranks.rank == 0 else [])
    return [Path(path) for path in found]


def _replaced(settings: CheckpointConfig) -> list[str]:
    if settings.save is None:
        return []
    if continues_save(settings):
        if settings.save_overwrite:
            expected = f"unset with --load {settings.load}, which resumes what it would delete"
            raise UsageError("--save-overwrite", True, expected)
        return []
    directory = Path(settings.save)
    if not has_checkpoint(directory):
        return []
    found = revisions(directory)
    if settings.save_overwrite:
        return [str(path) for paths in found.values() for path in paths]
    resumed = f"--load {settings.save}" + (" without --finetune" if settings.finetune else "")
    raise UsageError(
        "--save",
        f"{settings.save} with {_listed(list(found))}",
        "a directory without checkpoints, or the one that --load resumes",
        f"{resumed} continues that run, --save-overwrite starts a new one and deletes those"
        " checkpoints after its first save",
    )


def _listed(steps: list[int]) -> str:
    if not steps:
        return TRACKER
    named = ", ".join(map(str, steps[-_SHOWN:]))
    return f"steps {'..., ' if len(steps) > _SHOWN else ''}{named}"
