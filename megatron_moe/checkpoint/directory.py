"""The directory of a run's checkpoints: names, and the commit that makes a save all or nothing.

    DIR/latest_checkpointed_iteration.txt      the tracker: the step to continue from
    DIR/iter_0000010/manifest.json             SHA-256 and size of every other file
    DIR/iter_0000010/{config,state,index}.json
    DIR/iter_0000010/rank-00000.safetensors    one per rank

A save is written to `.saving-...` beside these, synced, renamed to its final name, and only then
named by the tracker: a directory with a final name is complete. A second save of a step becomes
`iter_0000010-1`, which replaces the first once it is complete; the highest such number counts.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_moe.checkpoint.files import FileRecord, replace_text, sync_directory
from megatron_moe.checkpoint.manifest import write_manifest
from megatron_moe.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's name."""

_FINAL = re.compile(r"iter_(\d{7,12})(?:-(\d{1,6}))?")
_SAVING, _REMOVING = ".saving-", ".removing-"


def revisions(directory: Path) -> dict[int, list[Path]]:
    """Complete checkpoints by step, each with its revisions in order; normally one."""
    found: dict[int, list[tuple[int, Path]]] = {}
    entries = directory.iterdir() if directory.is_dir() else ()
    for path in entries:
        match = _FINAL.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), []).append((int(match[2] or 0), path))
    return {step: [path for _, path in sorted(found[step])] for step in sorted(found)}


def has_checkpoint(directory: str | Path) -> bool:
    """Whether anything was ever saved here; a broken tracker counts as something."""
    path = Path(directory)
    return (path / TRACKER).exists() or bool(revisions(path))


def latest_step(directory: str | Path) -> int:
    """The step that the tracker names.

    Raises:
        CheckpointError: there is no such directory, no checkpoint in it, or the tracker is
            missing, or holds something other than the step of a checkpoint that is there.
    """
    path = Path(directory)
    if not has_checkpoint(path):
        found = "an empty directory" if path.is_dir() else "missing"
        fix = "training starts from step 0 instead with --allow-missing-load"
        raise CheckpointError(f"checkpoint directory {path}", found, "a saved checkpoint", fix)
    steps = list(revisions(path))
    tracker = path / TRACKER
    try:
        text = tracker.read_bytes()[:64].decode(errors="replace").strip()
    except FileNotFoundError:
        text = "missing"
    except OSError as error:
        raise CheckpointError(str(tracker), str(error), "a readable file") from None
    fix = f"choose a complete step with --ckpt-step: {_listed(steps)}"
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise CheckpointError(f"tracker {tracker}", text, "the step of a checkpoint", fix)
    if int(text) not in steps:
        raise CheckpointError(f"tracker {tracker}", text, "a step that is there", fix)
    return int(text)


def step_directory(directory: str | Path, step: int | None = None) -> tuple[int, Path]:
    """A step and where it is; without a step, the one that the tracker names.

    Raises:
        CheckpointError: it is not there.
    """
    path = Path(directory)
    chosen = latest_step(path) if step is None else step
    found = revisions(path)
    if chosen not in found:
        expected = f"a step of {path}: {_listed(list(found))}"
        raise CheckpointError("--ckpt-step", chosen, expected)
    return chosen, found[chosen][-1]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[-10:])) or "there is none"


def begin(directory: str | Path, step: int) -> Path:
    """An empty temporary directory for a save; what killed saves left behind is removed.

    Raises:
        OSError: no space, no permission.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    for left in path.iterdir():
        if left.name.startswith((_SAVING, _REMOVING)):
            shutil.rmtree(left, ignore_errors=True)
    temporary = path / f"{_SAVING}{final_name(step)}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def final_name(step: int, revision: int = 0) -> str:
    """The name of a complete checkpoint."""
    return f"iter_{step:07d}" + (f"-{revision}" if revision else "")


def commit(temporary: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
    """Turn a finished temporary directory into the checkpoint of a step; called by one rank.

    Args:
        temporary: from `begin`, with all files of ``files`` in it, written and synced.
        step: its step.
        files: what was written.

    Returns:
        Where the checkpoint now is.

    Raises:
        CheckpointError: a file that a rank wrote is not visible here.
        OSError: the disk is full, or anything else. The checkpoints that were there are untouched.
    """
    _require_visible(temporary, files)
    write_manifest(temporary, step, files)
    sync_directory(temporary)
    directory = temporary.parent
    older = revisions(directory).get(step, [])
    last = _FINAL.fullmatch(older[-1].name) if older else None
    final = directory / final_name(step, int(last[2] or 0) + 1 if last else 0)
    temporary.rename(final)
    sync_directory(directory)
    replace_text(directory / TRACKER, f"{step}\n")
    for path in older:
        remove(path)
    return final


def prune(directory: str | Path, step: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Remove what is older than the newest few; called by one rank, after the save of a step.

    Args:
        directory: of a run's checkpoints.
        step: the one just saved. Later ones, of a run that went back, are left alone.
        keep_last: how many steps stay, this one included.
        keep_every: multiples of this stay as well.

    Returns:
        The steps that were removed.

    Raises:
        OSError: one could not be removed; it is whole, or gone.
    """
    found = revisions(Path(directory))
    older = [each for each in found if each <= step]
    doomed = [s for s in older[:-keep_last] if keep_every is None or s % keep_every]
    for each in doomed:
        for path in found[each]:
            remove(path)
    return doomed


def remove(path: Path) -> None:
    """Delete a checkpoint so that no half of it can be taken for a whole one."""
    doomed = path.with_name(f"{_REMOVING}{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def discard(temporary: Path) -> None:
    """Delete what a failed save wrote."""
    shutil.rmtree(temporary, ignore_errors=True)


def _require_visible(temporary: Path, files: Mapping[str, FileRecord]) -> None:
    missing = []
    for name, record in files.items():
        path = temporary / name
        size = path.stat().st_size if path.exists() else None
        if size != record.bytes:
            missing.append(f"{path} has {size or 0} bytes here, {record.bytes} were written")
    if missing:
        expected = "on a file system that all nodes share"
        raise CheckpointError("--save", str(temporary.parent), expected, "", missing)
