"""Opens files of others, and says what a file is that is not what it should be.

A name may be that of a named pipe, which blocks whoever opens it, or of no file that can exist.
Git LFS pointers are the usual case of other content: a clone without `git lfs` has, in place of
each large file, a text of three lines.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from megatron_moe.errors import UsageError

SHOWN_BYTES = 24
"""First bytes of an unknown file that a message shows."""
_READ = 512
LARGEST_SMALL = 1 << 30
"""Bytes of the largest file that is read at once: metadata, settings, tokenizers. The index of a
checkpoint of a thousand ranks has a tenth of it."""
_HANDLES = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
"""Files that are open already, as a shell passes the output of another command."""
_LONGEST_NAME = 255
"""Bytes of the longest file name on Linux."""
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


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read, without waiting for another process.

    Opening a named pipe would wait for its writer. Files that are open already, as `/dev/fd/63` of
    a shell's `<(command)`, may be pipes.

    Raises:
        OSError: it cannot be opened, is no regular file, or its name is none: it has a NUL or half
            of a surrogate pair, which names in JSON may have.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file has such a name, {error}", str(path)) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode) and not str(path).startswith(_HANDLES):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        kind = _SPECIAL.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    os.set_blocking(handle, True)
    return os.fdopen(handle, "rb")


def read_small(path: str | Path, most: int = LARGEST_SMALL) -> bytes:
    """Return the content of a file that is held in memory: settings, metadata, a tokenizer.

    Raises:
        OSError: as `open_regular`, or it has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def first_bytes(path: str | Path, count: int = _READ) -> bytes:
    """The first bytes of a file, fewer if it is shorter.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read(count)


def is_file_name(name: object) -> bool:
    """Whether a value from a file of others is the name of a file in a directory, not a path."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\0"}:
        return False
    try:
        return len(os.fsencode(name)) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


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
