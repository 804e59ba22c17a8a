"""A directory that appears whole or not at all: what formats without steps are written into."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moe.checkpoint.disk import sync_directory
from megatron_moe.errors import CheckpointError


def check_new(directory: Path) -> None:
    """Refuse a directory that is there: nothing is overwritten.

    Raises:
        CheckpointError: it is there.
    """
    if directory.exists():
        raise CheckpointError("--save", str(directory), "a directory that does not exist yet")


@contextmanager
def new_directory(directory: Path, size: int) -> Iterator[Path]:
    """A temporary directory to write into; it gets its name at the end, when all is on the disk.

    Args:
        directory: the name.
        size: bytes that will be written, for messages.

    Raises:
        CheckpointError: the directory exists, or what was done in it failed; nothing is left.
    """
    check_new(directory)
    temporary = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise no_room(directory, size, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def no_room(directory: Path, size: int, error: Exception) -> CheckpointError:
    """A failed write in words."""
    found = getattr(error, "strerror", None) or str(error).split("\n", maxsplit=1)[0]
    expected = f"a directory with room for {size} bytes"
    return CheckpointError(f"--save {directory}", found, expected)


def _sync(directory: Path) -> None:
    """Onto the disk with everything that was written."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
