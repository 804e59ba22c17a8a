"""Output of a conversion: a directory that appears complete or not at all, and its files."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.disk import sync_directory
from megatron_moe.convert.model import LazyTensor
from megatron_moe.errors import CheckpointError

Progress = Callable[[int], Any]
"""Called with the bytes of each part that has been written."""


def split_into_files(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[list[str]]:
    """Names in order, one list per file of at most ``max_bytes``; a larger tensor gets its own."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.bytes
    return files


def check_new(directory: Path) -> None:
    """Require that a directory does not exist: nothing is overwritten.

    Raises:
        CheckpointError: it exists.
    """
    if directory.exists():
        raise CheckpointError("--save", str(directory), "a directory that does not exist")


@contextmanager
def new_directory(directory: Path, size: int) -> Iterator[Path]:
    """A temporary directory to write into, renamed to ``directory`` once everything is on disk.

    Args:
        directory: the final name.
        size: bytes that will be written, for messages.

    Raises:
        CheckpointError: the directory exists, or writing failed; nothing is left behind.
    """
    check_new(directory)
    temporary = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # Synced before the rename: after a power failure the final name must not refer to files
        # whose contents never reached the disk.
        _sync(temporary)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise write_error(directory, size, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_error(directory: Path, size: int, error: Exception) -> CheckpointError:
    """The error to raise for a failed write, typically a full disk."""
    found = getattr(error, "strerror", None) or str(error).split("\n", maxsplit=1)[0]
    expected = f"a writable directory with {size} bytes of free space"
    return CheckpointError(f"--save {directory}", found, expected)


def _sync(directory: Path) -> None:
    """Sync every file and directory below ``directory`` to disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
