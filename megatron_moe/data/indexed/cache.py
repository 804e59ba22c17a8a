"""A cache of sample indices and scan results on disk: built once, read by many processes.

An entry is a directory that appears complete, by rename, or not at all. Processes that need the
same entry at the same time wait for the one that holds its lock; the kernel releases the lock of a
killed process. On a file system without locks each process builds its own, and the first rename
wins. Names are hashes of everything the entry depends on, so a corpus that is replaced at its path
gets new entries.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.errors import UsageError

Array = npt.NDArray[Any]
_MANIFEST = "manifest.json"
"""Names and sizes of the files of an entry; written last, so that its presence means complete."""
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
        except (OSError, ValueError) as error:
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
        if _is_complete(folder):
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / f".{name}.lock"):
                if not _is_complete(folder):
                    _build(folder, fill)
        except OSError as error:
            expected = "a writable directory with free space"
            raise UsageError("--data-cache-path", self.directory, expected, str(error)) from None
        return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file of the manifest exists with its size."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build(folder: Path, fill: Callable[[Path], None]) -> None:
    _sweep(folder)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        fill(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(sizes) + "\n")
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(partial, folder)
        except OSError:
            if not _is_complete(folder):  # else another process, not held by our lock, was first
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
