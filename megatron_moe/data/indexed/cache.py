"""Sample indices and scan results on disk: built once, used by many processes.

An entry is a directory that appears whole, by rename, or not at all. Processes that want the same
entry at once wait for the one that holds its lock (the kernel frees the lock of a killed one);
where a file system has no locks, each builds its own and the first rename wins. Names are hashes of
what the entry depends on, so that a replaced corpus never meets an old entry.
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
"""Names and sizes of an entry's files; written last."""
_STALE = 24 * 3600.0
"""Seconds after which a partial entry is taken for a dead process's."""


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
        """The arrays of an entry, mapped read-only.

        Args:
            name: the entry.
            description: what it was made from, stored beside it for people.
            build: makes the arrays if the entry is not there.
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
            raise UsageError("index cache", str(folder), "arrays", f"delete it: {error}") from None

    def record(self, name: str, build: Callable[[], dict[str, int]]) -> dict[str, int]:
        """The numbers of an entry."""

        def fill(folder: Path) -> None:
            (folder / "record.json").write_text(json.dumps(build()) + "\n")

        path = self._entry(name, fill) / "record.json"
        try:
            values = json.loads(path.read_text())
            return {str(key): int(value) for key, value in values.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError("index cache", str(path), "numbers", f"delete it: {error}") from None

    def _entry(self, name: str, fill: Callable[[Path], None]) -> Path:
        folder = Path(self.directory) / name
        if _is_whole(folder):
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent / f".{name}.lock"):
                if not _is_whole(folder):
                    _build(folder, fill)
        except OSError as error:
            raise UsageError(
                "--data-cache-path", self.directory, "a directory with room to write", str(error)
            ) from None
        return folder


def _is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there in its size."""
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
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(partial, folder)
        except OSError:
            if not _is_whole(folder):  # else a process that our lock did not reach was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what processes killed long ago left of this entry."""
    for left in folder.parent.glob(f"{folder.name}.partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that dies with the process; on a file system without locks, none."""
    with open(path, "wb") as stream:
        # Without a lock the work may be done twice; the rename keeps the result whole either way.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
