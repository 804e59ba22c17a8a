"""A disk with little room, for tests that fill it."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def _ballast(mount: Path, free: int) -> Iterator[None]:
    """A mounted file system with so many KiB left."""
    path = mount / "ballast"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    with path.open("r+b") as file:
        file.truncate(max(path.stat().st_size - (free << 10), 0))
    yield
    path.unlink()


@contextlib.contextmanager
def _limit(free: int) -> Iterator[None]:
    """Files of at most half a KiB per KiB: the next best thing without the right to mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free << 9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def scarce(tmp_path):
    """A directory, and a context in which it has little room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(mount)]
    may_mount = (
        shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    )
    if may_mount:
        yield mount / "run", lambda free: _ballast(mount, free)
        subprocess.run(["umount", "-l", str(mount)], check=True)
    else:
        yield mount / "run", _limit
