"""A cache of sample indices and scan results on disk: built once, read by many processes.

An entry is a directory that appears complete, by rename, or not at all. Processes that need the
same entry at the same time wait for the one that holds its lock; the kernel releases the lock of a
killed process. On a file system without locks each process builds its own, and the first rename
wins. Names are hashes of everything the entry depends on, so a corpus that is replaced at its path
gets new entries.

Each process compares the files of an entry with their SHA-256 when it opens them, and builds an
entry that was damaged or changed again: training on another order of samples looks like any other
training. The cost is to read and hash the entry once for each start and process that reads data,
one thread for each file: for 10^9 tokens 37 MB, with UL2 104 MB (`bench/data_indices.py`); the
processes of a node share its page cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.errors import UsageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
_MANIFEST = "manifest.json"
"""Bytes and SHA-256 of the files of an entry; written last, so that its presence means complete."""
_BLOCK = 1 << 20
_THREADS = 4
_ATTEMPTS = 10
_STALE = 24 * 3600.0
"""Seconds after which a partial entry is considered abandoned."""


@dataclass(frozen=True)
class IndexCache:
    """A directory of entries."""

    directory: str

    def arrays(
        self,
        name: str,
        description: Mapping[str, Any],
        build: Callable[[], Sequence[Array]],
    ) -> list[Array]:
        """Return the arrays of an entry, memory-mapped read-only.

        Args:
            name: of the entry.
            description: what it was made from; stored with it for people to read.
            build: makes the arrays if there is no entry.

        Raises:
            UsageError: the directory cannot be written, or an entry cannot be read.
        """

        def fill(folder: Path) -> None:
            (folder / "description.json").write_text(json.dumps(description, indent=2) + "\n")
            for i, values in enumerate(build()):
                np.save(folder / f"{i}.npy", values)

        folder = self._entry(name, fill)
        files = sorted(folder.glob("*.npy"), key=lambda path: int(path.stem))
        try:
            return [np.load(path, mmap_mode="r") for path in files]
        except Exception as error:  # NumPy reads a header with Python's parser
            fix = f"delete it: {error}"
            raise UsageError("index cache", str(folder), "readable", fix) from None

    def record(self, name: str, build: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Return the numbers of an entry; `build` makes them if there is none."""

        def fill(folder: Path) -> None:
            (folder / "record.json").write_text(json.dumps(build()) + "\n")

        path = self._entry(name, fill) / "record.json"
        try:
            values = json.loads(path.read_text())
            return {str(key): int(value) for key, value in values.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            fix = f"delete it: {error}"
            raise UsageError("index cache", str(path), "a JSON object of numbers", fix) from None

    def _entry(self, name: str, fill: Callable[[Path], None]) -> Path:
        folder = Path(self.directory) / name
        fault = ""
        try:
            for _ in range(_ATTEMPTS):
                # Files are hashed without the lock: the processes of a node would wait in turn.
                seen = _version(folder)
                fault = _fault(folder)
                if not fault:
                    return folder
                folder.parent.mkdir(parents=True, exist_ok=True)
                with _lock(folder.parent / f".{name}.lock"):
                    # Another version is one that another process has built meanwhile.
                    if _version(folder) == seen:
                        if seen is not None:
                            logger.warning("index cache %s: %s; it is built again", folder, fault)
                        _build(folder, fill, seen)
                        return folder
        except OSError as error:
            expected = "a writable directory with free space"
            raise UsageError("--data-cache-path", self.directory, expected, str(error)) from None
        fix = "it was damaged again and again; use another --data-cache-path"
        raise UsageError(f"index cache {folder}", fault, "what was built", fix)


def _version(folder: Path) -> tuple[int, int] | None:
    """Identifies what a process built there, whole or damaged; `None` if there is nothing."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _fault(folder: Path) -> str:
    """What is wrong with an entry; empty if every file of the manifest is what was written."""
    try:
        recorded = json.loads((folder / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, RecursionError):
        return "its manifest is not JSON"
    if not isinstance(recorded, dict) or not all(map(_is_record, recorded.values())):
        return "its manifest has no checksums"
    if recorded.keys() != {path.name for path in folder.iterdir()} - {_MANIFEST}:
        return "its files are not those of its manifest"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _record(folder / name), recorded)
        changed = [n for n, one in zip(recorded, found, strict=True) if one != recorded[n]]
    return f"{', '.join(changed)} changed since it was built" if changed else ""


def _is_record(value: object) -> bool:
    """Whether a value of a manifest is one; earlier versions recorded sizes only."""
    return isinstance(value, list) and [type(part) for part in value] == [int, str]


def _record(path: Path) -> list[int | str] | None:
    """Bytes and SHA-256 of a file; `None` if it is missing."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return None
    return [size, digest.hexdigest()]


def _build(folder: Path, fill: Callable[[Path], None], replaced: tuple[int, int] | None) -> None:
    """Build an entry, in place of the damaged one of a version, if there is one."""
    _sweep(folder)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        fill(partial)
        records = {path.name: _record(path) for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(records) + "\n")
        if replaced is not None and _version(folder) == replaced:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(partial, folder)
        except OSError:
            if _fault(folder):  # else another process, not held by our lock, was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove partial entries that processes left behind when they were killed long ago."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process; no lock on a file system without locks."""
    with open(path, "wb") as stream:
        # Without a lock two processes may build the entry; renaming keeps it complete either way.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
