"""The manifest: which files make up a checkpoint, and the checksums that they are trusted by."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.files import FileRecord, check_file, read_json, write_json
from megatron_moe.errors import Corrupt

MANIFEST = "manifest.json"
FORMAT = "megatron_moe checkpoint"
VERSION = 1
"""Of the format; a reader refuses versions that it does not know."""

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_THREADS_PER_CORE, _MOST_THREADS = 2, 8
"""That hash files: some wait for the disk while the others compute."""
_NAMED = 3
"""Damaged files that the last line of an error names; the lines above it have all."""


def write_manifest(path: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """List the files of a checkpoint.

    Raises:
        OSError: the disk is full, or anything else.
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
    """The files of a checkpoint.

    Raises:
        Corrupt: the manifest is missing, broken, of another format, or names a file outside.
    """
    source = path / MANIFEST
    content = read_json(source)
    if content.get("format") != FORMAT:
        raise Corrupt(str(source), content.get("format"), f"format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise Corrupt(str(source), content.get("version"), f"version {VERSION} of the format")
    if content.get("digest") != _digest(content):
        raise Corrupt(str(source), content.get("digest"), f"digest {_digest(content)}")
    listed = content.get("files")
    if not isinstance(listed, dict):
        raise Corrupt(str(source), type(listed).__name__, "an object of files")
    return {name: _record(path, name, entry) for name, entry in listed.items()}


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    """Names are plain, and even a link must not lead outside."""
    if not _FILE.fullmatch(name) or (path / name).resolve().parent != path.resolve():
        raise Corrupt(f"file in {path / MANIFEST}", name, "a name inside the checkpoint")
    try:
        record = FileRecord(str(entry["sha256"]), int(entry["bytes"]))
    except (KeyError, TypeError, ValueError):
        raise Corrupt(f"entry {name} of {path / MANIFEST}", entry, "sha256 and bytes") from None
    return record


def require_whole(path: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Compare files with their checksums.

    Raises:
        Corrupt: naming every file that is missing, truncated or changed.
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
        raise Corrupt(str(path), f"damaged in {named}{more}", "as it was written", "", lines)
