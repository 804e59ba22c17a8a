"""Which step a run resumes from, the same on every rank; with a fallback, the newest intact one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.directory import (
    latest_step,
    require_native,
    revisions,
    step_directory,
    verify_files,
)
from megatron_moe.checkpoint.index import INDEX
from megatron_moe.checkpoint.metadata import (
    CheckpointMetadata,
    JsonFiles,
    parse_json_files,
    read_json_files,
)
from megatron_moe.errors import CheckpointError, Corrupt, NoCheckpoint, with_fixes
from megatron_moe.parallel.collectives import RankGroup

FIXES: dict[type[CheckpointError], str] = {
    Corrupt: "another step, with --ckpt-step or --checkpoint-fallback, may be intact",
    NoCheckpoint: "--allow-missing-load starts from step 0 instead",
}
"""For `with_fixes`: what a run can do about a checkpoint that it cannot load."""


@dataclass(frozen=True, kw_only=True)
class SelectedCheckpoint:
    """The step to resume from."""

    path: Path
    """Its directory."""
    verified: bool
    """Whether all of its files were verified."""
    skipped: tuple[str, ...] = ()
    """Why newer steps were skipped, one line each."""


@with_fixes(FIXES)
def select_checkpoint(
    directory: str | Path, step: int | None, *, fallback: bool, ranks: RankGroup
) -> tuple[SelectedCheckpoint, CheckpointMetadata]:
    """Select a step; called by all ranks together. Rank 0 reads, and broadcasts what it read.

    Args:
        directory: of a run's checkpoints.
        step: the step to select; by default the one that the tracker names.
        fallback: if that step is damaged, select the newest earlier one that is intact; if the
            tracker names no step, the newest intact one.
        ranks: the ranks that select together; with a fallback they divide the verification.

    Returns:
        The selected step and its metadata, without the index of tensors.

    Raises:
        CheckpointError: on every rank: there is no such step, or none is intact.
    """
    folder = Path(directory)
    if not fallback:
        named = ranks.run_on_all(
            lambda: str(step_directory(folder, step)[1]) if ranks.rank == 0 else ""
        )
        path = Path(ranks.broadcast(named))
        return SelectedCheckpoint(path=path, verified=False), _open(path, ranks, verify=False)
    found = ranks.run_on_all(lambda: _candidates(folder) if ranks.rank == 0 else None)
    skipped, candidates = ranks.broadcast(found)
    for each in map(Path, candidates):
        try:
            opened = _open(each, ranks, verify=True)
        except Corrupt as error:
            skipped.append(f"{each.name} is damaged and was skipped: {_short(error)}")
            continue
        return SelectedCheckpoint(path=each, verified=True, skipped=tuple(skipped)), opened
    what = f"at least one checkpoint in {folder}"
    raise CheckpointError(what, f"{len(candidates)} damaged", "intact", "", skipped)


def _candidates(directory: Path) -> tuple[list[str], list[str]]:
    """What is wrong with the tracker, if anything, and the steps to try, newest first."""
    require_native(directory)
    found = revisions(directory)
    try:
        newest, wrong = latest_step(directory), []
    except CheckpointError as error:
        if not found:
            raise
        newest, wrong = max(found), [f"{_short(error)}; the newest intact step is used"]
    # Steps after the tracker's are of a run that went back: they are not candidates.
    return wrong, [str(found[step][-1]) for step in sorted(found, reverse=True) if step <= newest]


def _short(error: CheckpointError) -> str:
    """One line of an error, without the fix."""
    if error.details:
        return error.details[0]
    return f"{error.what} must be {error.expected} (got {error.found!r})"


def _open(path: Path, ranks: RankGroup, *, verify: bool) -> CheckpointMetadata:
    """Rank 0 reads the JSON files and broadcasts them, but for the index, which may be large.

    Args:
        path: of one step.
        ranks: the ranks that open it.
        verify: also verify the index, and the tensor files, divided among the ranks.
    """

    def read() -> JsonFiles:
        content = read_json_files(path)
        if verify:
            parse_json_files(path, content)
        return {name: value for name, value in content.items() if name != INDEX}

    content = ranks.broadcast(ranks.run_on_all(lambda: read() if ranks.rank == 0 else None))
    opened = ranks.run_on_all(lambda: parse_json_files(path, content))
    if verify:
        verify_tensors(opened, ranks)
    return opened


def verify_tensors(opened: CheckpointMetadata, ranks: RankGroup) -> None:
    """Compare the tensor files with their checksums, divided among the ranks.

    Raises:
        Corrupt: on every rank, naming every damaged file.
    """
    mine = opened.tensor_files[ranks.rank :: ranks.size]
    ranks.run_on_all(lambda: verify_files(opened.path, opened.files, mine))
