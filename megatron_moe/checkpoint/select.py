"""Which step a run goes on from, the same on every rank; with a fallback, the newest whole one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.directory import latest_step, revisions, step_directory
from megatron_moe.checkpoint.index import INDEX
from megatron_moe.checkpoint.manifest import require_whole
from megatron_moe.checkpoint.reading import (
    CheckpointMetadata,
    Documents,
    opened_from,
    read_documents,
)
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.parallel.collectives import RankGroup


@dataclass(frozen=True, kw_only=True)
class SelectedCheckpoint:
    """A step to go on from."""

    path: Path
    """Its directory."""
    verified: bool
    """Whether every file of it was read and found whole."""
    skipped: tuple[str, ...] = ()
    """Why newer ones were not taken, one line each."""


def choose(
    directory: str | Path, step: int | None, *, fallback: bool, ranks: RankGroup
) -> tuple[SelectedCheckpoint, CheckpointMetadata]:
    """Choose a step; called by all ranks together, rank 0 reads and tells the others.

    Args:
        directory: of a run's checkpoints.
        step: the one to take; by default the one that the tracker names.
        fallback: if that is damaged, take the newest earlier one of which every file is whole; if
            the tracker names none, the newest one.
        ranks: who chooses together; with a fallback they share out the reading.

    Returns:
        The choice, and what it says of itself, without the tensors.

    Raises:
        CheckpointError: on every rank: it is not there, or none is whole.
    """
    folder = Path(directory)
    if not fallback:
        named = ranks.run_on_all(
            lambda: str(step_directory(folder, step)[1]) if ranks.rank == 0 else ""
        )
        path = Path(ranks.broadcast(named))
        return SelectedCheckpoint(path=path, verified=False), _open(path, ranks, whole=False)
    looked = ranks.run_on_all(lambda: _candidates(folder) if ranks.rank == 0 else None)
    skipped, candidates = ranks.broadcast(looked)
    for each in map(Path, candidates):
        try:
            opened = _open(each, ranks, whole=True)
        except Corrupt as error:
            skipped.append(f"{each.name} is damaged and was not taken: {_short(error)}")
            continue
        return SelectedCheckpoint(path=each, verified=True, skipped=tuple(skipped)), opened
    found, expected = f"{len(candidates)} damaged checkpoints", "one that is whole"
    raise CheckpointError(str(folder), found, expected, "", skipped)


def _candidates(directory: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the tracker, if anything, and steps to try, the newest first."""
    found = revisions(directory)
    try:
        newest, wrong = latest_step(directory), []
    except CheckpointError as error:
        if not found:
            raise
        newest, wrong = max(found), [f"{_short(error)}; the newest whole step counts"]
    return wrong, [str(found[step][-1]) for step in sorted(found, reverse=True) if step <= newest]


def _short(error: CheckpointError) -> str:
    """One line of an error, without the advice."""
    return error.details[0] if error.details else f"{error.what} is {error.found!r}"


def _open(path: Path, ranks: RankGroup, *, whole: bool) -> CheckpointMetadata:
    """Rank 0 reads the small files; the others are told all but the index, which may be large.

    Args:
        path: of one step.
        ranks: who opens it.
        whole: verify the index and, shared out among the ranks, the tensors' files as well.
    """

    def read() -> Documents:
        documents = read_documents(path)
        if whole:
            opened_from(path, documents)
        return {name: value for name, value in documents.items() if name != INDEX}

    told = ranks.broadcast(ranks.run_on_all(lambda: read() if ranks.rank == 0 else None))
    opened = ranks.run_on_all(lambda: opened_from(path, told))
    if whole:
        verify_tensors(opened, ranks)
    return opened


def verify_tensors(opened: CheckpointMetadata, ranks: RankGroup) -> None:
    """Compare the files that hold tensors with their checksums, shared out among the ranks.

    Raises:
        Corrupt: on every rank, naming what is damaged.
    """
    mine = opened.tensor_files[ranks.rank :: ranks.size]
    ranks.run_on_all(lambda: require_whole(opened.path, opened.files, mine))
