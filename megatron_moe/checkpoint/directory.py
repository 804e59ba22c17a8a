"""The directory of a run's checkpoints: names, the tracker, the manifest, and the atomic commit.

    DIR/latest_checkpointed_iteration.txt      the tracker: the step to resume from
    DIR/iter_0000010/manifest.json             SHA-256 and size of every other file
    DIR/iter_0000010/{config,state,index}.json
    DIR/iter_0000010/rank-00000.safetensors    at least one per rank

A save is written to a directory `.saving-...`, synced, renamed to its final name, and then named by
the tracker: a directory with a final name is complete. A second save of a step becomes
`iter_0000010-1`, which replaces the first once it is complete; the highest such number counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.disk import (
    FileRecord,
    check_file,
    read_json,
    replace_text,
    sync_directory,
    write_json,
)
from megatron_moe.checkpoint.foreign import (
    describe_contents,
    not_native,
    reject_foreign,
    weights_in,
)
from megatron_moe.errors import CheckpointError, Corrupt, NoCheckpoint
from megatron_moe.files import first_bytes

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron-LM's name."""
MANIFEST = "manifest.json"
FORMAT = "megatron_moe checkpoint"
VERSION = 1
"""Of the format; readers reject other versions."""

ANOTHER_STEP: dict[type[CheckpointError], str] = {
    Corrupt: "another step, with --ckpt-step, may be intact"
}
"""For `with_fixes`, in commands that read one step."""

_FINAL = re.compile(r"iter_(\d{7,12})(?:-(\d{1,6}))?")
_SAVING, _REMOVING = ".saving-", ".removing-"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_THREADS_PER_CORE, _MOST_THREADS = 2, 8
"""Threads that verify files: some wait for the disk while the others hash."""
_NAMED = 3
"""Damaged files named in the last line of an error; the lines before it name all."""


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
    """Whether a checkpoint or a tracker is there; a broken tracker counts, so that it is seen."""
    path = Path(directory)
    return (path / TRACKER).exists() or bool(revisions(path))


def latest_step(directory: str | Path) -> int:
    """The step that the tracker names.

    Raises:
        NoCheckpoint: the directory or its checkpoints are missing.
        CheckpointError: other weights are there, or the tracker is missing or does not name the
            step of a complete checkpoint.
    """
    path = Path(directory)
    require_native(path)
    steps = list(revisions(path))
    tracker = path / TRACKER
    try:
        text = first_bytes(tracker, 64).decode(errors="replace").strip()
    except FileNotFoundError:
        text = "missing"
    except OSError as error:
        raise CheckpointError(str(tracker), str(error), "a readable file") from None
    what, fix = f"step in tracker {tracker}", f"choose one with --ckpt-step: {_listed(steps)}"
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise CheckpointError(what, text, "the number of a complete step", fix)
    if int(text) not in steps:
        raise CheckpointError(what, text, "a complete step of this directory", fix)
    return int(text)


def require_native(path: Path) -> None:
    """Require that a directory has checkpoints of a run, and not those of another program.

    Raises:
        NoCheckpoint: there are no weights at all.
        CheckpointError: there are others, here, in a folder below, or in the one above.
    """
    if not has_checkpoint(path):
        reject_foreign(path)
        what, expected = f"checkpoint directory {path}", "a directory with a saved checkpoint"
        raise NoCheckpoint(what, describe_contents(path), expected)
    # Megatron-LM's names are the same: a tracker and `iter_0000100`.
    found = weights_in(path)
    if found is not None and found.format != "native":
        raise not_native(path, found)


def step_directory(directory: str | Path, step: int | None = None) -> tuple[int, Path]:
    """A step and the directory that holds it; by default the step that the tracker names.

    Raises:
        NoCheckpoint: the directory or its checkpoints are missing.
        CheckpointError: there is no such step, or other weights are there.
    """
    path = Path(directory)
    require_native(path)
    number = latest_step(path) if step is None else step
    found = revisions(path)
    if number not in found:
        expected = f"a complete step of {path}: {_listed(list(found))}"
        raise CheckpointError("--ckpt-step", number, expected)
    return number, found[number][-1]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[-10:])) or "there is none"


def begin(directory: str | Path, step: int) -> Path:
    """Create an empty temporary directory for a save; remove what killed saves left behind.

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
    """The name of a complete checkpoint's directory."""
    return f"iter_{step:07d}" + (f"-{revision}" if revision else "")


def commit(temporary: Path, step: int, files: Mapping[str, FileRecord]) -> Path:
    """Turn a finished temporary directory into the checkpoint of a step; called by one rank.

    Args:
        temporary: from `begin`, with all of ``files`` in it, written and synced.
        step: its step.
        files: records of the files that all ranks wrote.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointError: a file that another rank wrote is not visible here.
        OSError: the disk is full, or any other failure. Existing checkpoints are unchanged.
    """
    # The order makes the save atomic: contents and their directory are on the disk before the
    # rename gives them a name that counts, and the name is on the disk before the tracker has it.
    # A kill between any two lines leaves the old checkpoint or a complete new one.
    _check_visible(temporary, files)
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


def _check_visible(temporary: Path, files: Mapping[str, FileRecord]) -> None:
    missing = []
    for name, record in files.items():
        path = temporary / name
        size = path.stat().st_size if path.exists() else None
        if size != record.bytes:
            missing.append(f"{path} has {size or 0} bytes here, {record.bytes} were written")
    if missing:
        expected = "on a file system that all nodes share"
        raise CheckpointError("--save", str(temporary.parent), expected, "", missing)


def prune(directory: str | Path, step: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Remove older steps; called by one rank, after the save of a step.

    Args:
        directory: of a run's checkpoints.
        step: the step just saved. Later ones, of a run that went back, are kept.
        keep_last: number of newest steps that are kept, this one included.
        keep_every: multiples of this are kept as well.

    Returns:
        The steps that were removed.

    Raises:
        OSError: one could not be removed; it is complete or gone.
    """
    found = revisions(Path(directory))
    older = [each for each in found if each <= step]
    doomed = [s for s in older[:-keep_last] if keep_every is None or s % keep_every]
    for each in doomed:
        for path in found[each]:
            remove(path)
    return doomed


def remove(path: Path) -> None:
    """Delete a checkpoint; the rename first, so that a partial deletion never looks complete."""
    doomed = path.with_name(f"{_REMOVING}{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def discard(temporary: Path) -> None:
    """Delete the files of a failed save."""
    shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(path: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Write the list of a checkpoint's files with their checksums.

    Raises:
        OSError: the disk is full, or any other failure.
    """
    listed = {
        name: {"sha256": record.sha256, "bytes": record.bytes}
        for name, record in sorted(files.items())
    }
    content = {"format": FORMAT, "version": VERSION, "step": step, "files": listed}
    write_json(path / MANIFEST, {**content, "digest": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    """The manifest's own checksum, over everything else in it."""
    plain = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint, from its manifest.

    Raises:
        Corrupt: the manifest is missing, damaged, of another format, of another step than the
            directory's name says, or names a file outside the checkpoint.
    """
    source = path / MANIFEST
    content = read_json(source)
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if content.get(key) != expected:
            raise Corrupt(f"{key} in {source}", content.get(key), repr(expected))
    if content.get("digest") != (digest := _digest(content)):
        raise Corrupt(f"digest in {source}", content.get("digest"), repr(digest))
    _check_step(path, content.get("step"))
    listed = content.get("files")
    if not isinstance(listed, dict):
        raise Corrupt(f"files in {source}", type(listed).__name__, "an object of files")
    return {name: _record(path, name, entry) for name, entry in listed.items()}


def _check_step(path: Path, step: Any) -> None:
    """A renamed or copied directory would resume at another step than its tensors are of."""
    named = _FINAL.fullmatch(path.name)
    if named is None or step == int(named[1]):
        return
    fix = ""
    if type(step) is int and step >= 0:
        fix = f"it was saved as {final_name(step)} and renamed or copied; give it that name again"
    what, expected = f"step in {path / MANIFEST}", f"{int(named[1])}, as the directory's name says"
    raise Corrupt(what, step, expected, fix)


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    # A manifest may come from anywhere: no name, and no link, may lead out of the checkpoint.
    if not _FILE.fullmatch(name) or (path / name).resolve().parent != path.resolve():
        raise Corrupt(f"file name in {path / MANIFEST}", name, "a name inside the checkpoint")
    try:
        record = FileRecord(str(entry["sha256"]), int(entry["bytes"]))
    except (KeyError, TypeError, ValueError):
        what, expected = f"entry {name} of {path / MANIFEST}", "an object with sha256 and bytes"
        raise Corrupt(what, entry, expected) from None
    return record


def verify_files(path: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Compare files with their records.

    Args:
        path: the checkpoint.
        files: records of all its files.
        names: the files to compare.

    Raises:
        Corrupt: names every file that is missing, truncated or changed.
    """
    chosen = list(names)
    threads = min(_THREADS_PER_CORE * (os.cpu_count() or 1), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(lambda name: check_file(path / name, files[name]), chosen))
    found = [(name, fault) for name, fault in zip(chosen, faults, strict=True) if fault]
    if found:
        named = ", ".join(name for name, _ in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        lines = [fault for _, fault in found]
        raise Corrupt(str(path), f"damage in {named}{more}", "intact", "", lines)
