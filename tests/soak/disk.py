"""A small file system that can be filled for a moment."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[bool]:
    """A tmpfs mounted at ``path``; False, and a plain directory, without the right to mount."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """Take what is left of the file system."""
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def empty(disk: Path) -> None:
    """Give it back."""
    (disk / "ballast").unlink(missing_ok=True)
