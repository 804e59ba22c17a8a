"""What a file is, by its first bytes: for messages about a file that is not what it should be.

Git LFS pointers are the usual case: a clone without `git lfs` has, in place of each large file, a
text of three lines.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from megatron_moe.errors import UsageError

SHOWN_BYTES = 24
"""First bytes of an unknown file that a message shows."""
_READ = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_BEGINNINGS = (
    (re.compile(rb"\x1f\x8b"), "it is compressed with gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "it is compressed with zstd"),
    (re.compile(rb"PK\x03\x04"), "it is a zip archive, as PyTorch's files are"),
    (re.compile(rb"\x80[\x02-\x05]"), "it is a pickle"),
    (re.compile(rb"PAR1"), "it is a Parquet file"),
    (re.compile(rb"GGUF"), "it is a GGUF file"),
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), "it is an HTML page"),
    (re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n"), "it is a vocabulary of tiktoken"),
)
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def first_bytes(path: str | Path, count: int = _READ) -> bytes:
    """The first bytes of a file, fewer if it is shorter.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        return file.read(count)


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins with ``start`` is a Git LFS pointer."""
    return start.startswith(_LFS)


def describe_start(start: bytes) -> str:
    """What a file is that begins with ``start``, as part of a message: `it is empty`.

    Args:
        start: from `first_bytes`.
    """
    if not start:
        return "it is empty"
    if is_lfs_pointer(start):
        return "it is a Git LFS pointer, not the file itself; get the file with git lfs pull"
    known = (what for pattern, what in _BEGINNINGS if pattern.match(start))
    return next(known, f"it begins with {start[:SHOWN_BYTES]!r}")


def describe_file_start(path: str | Path) -> str:
    """`describe_start` of a file, or why it cannot be read."""
    try:
        return describe_start(first_bytes(path))
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def check_regular_file(path: str | Path, what: str) -> None:
    """Check that a file that is read several times is not a named pipe, which is empty after once.

    Args:
        path: the file; nothing is checked if it does not exist or is a directory.
        what: the flag that names it, for errors.

    Raises:
        UsageError: names the file and what it is.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:  # the reader says so
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        fix = f"it is {_SPECIAL.get(stat.S_IFMT(mode), 'a special file')}, and is read repeatedly"
        raise UsageError(what, str(path), "a regular file", fix)


def check_data_file(path: str | Path, what: str) -> None:
    """`check_regular_file`, and that the file is not a Git LFS pointer, which would pass as data.

    Raises:
        UsageError: names the file and what it is.
    """
    check_regular_file(path, what)
    try:
        start = first_bytes(path)
    except OSError:  # the reader says so
        return
    if is_lfs_pointer(start):
        raise UsageError(what, str(path), "the data itself", describe_start(start))
