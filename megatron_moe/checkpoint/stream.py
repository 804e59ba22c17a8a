"""Bytes on their way to a file or from it, hashed meanwhile.

Hashing releases the interpreter's lock, as reading and writing do, so files are written and read
several at a time; a file that is written is hashed by a second thread.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from threading import Event

CHUNK = 16 << 20
"""Bytes written at a time."""
SMALL = 1 << 20
"""Shorter parts are put together, up to about as many bytes: each chunk has a fixed cost."""
Stream = Callable[[], Iterator[memoryview]]
"""Begins the bytes of a file, cut anywhere."""
_FILES = 4
"""Files written at a time, if there are so many cores."""
_AHEAD = 2
"""Chunks that writing may be ahead of hashing."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    sha256: str
    bytes: int


class Stopped(Exception):
    """A write that was told to stop; its file is of no use."""


def write_stream(path: Path, parts: Iterator[memoryview], stop: Event | None = None) -> FileRecord:
    """Write a new file and sync it to the disk.

    Args:
        path: a file that does not exist.
        parts: its bytes, cut anywhere. At most the last few are kept.
        stop: give up at the next chunk once this is set.

    Raises:
        OSError: the disk is full, or anything else.
        Stopped: ``stop`` was set.
    """
    digest, total = hashlib.sha256(), 0
    hashing: deque[Future[None]] = deque()
    chunks = _chunks(parts)
    # Three threads: parts are made (copied from a GPU, or to be contiguous), written, and hashed.
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        with ThreadPoolExecutor(1) as maker:
            coming = maker.submit(next, chunks, None)
            while (chunk := coming.result()) is not None:
                if stop is not None and stop.is_set():
                    raise Stopped
                coming = maker.submit(next, chunks, None)
                hashing.append(hasher.submit(digest.update, chunk))
                _write_all(file, chunk)
                total += len(chunk)
                if len(hashing) > _AHEAD:
                    hashing.popleft().result()
        os.fsync(file.fileno())
    for last in hashing:
        last.result()
    return FileRecord(digest.hexdigest(), total)


def write_streams(streams: Mapping[Path, Stream], stop: Event | None = None) -> list[FileRecord]:
    """`write_stream` of several files, a few at a time; if one fails, none goes on.

    Raises:
        OSError: the disk is full, or anything else.
        Stopped: ``stop`` was set.
    """
    given_up = stop or Event()

    def write(path: Path) -> FileRecord:
        try:
            return write_stream(path, streams[path](), given_up)
        except BaseException:
            given_up.set()
            raise

    with ThreadPoolExecutor(min(_FILES, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(write, path) for path in streams]
    errors = [error for task in tasks if (error := task.exception())]
    for error in errors:
        if not isinstance(error, Stopped):
            raise error
    if errors:
        raise errors[0]
    return [task.result() for task in tasks]


def _chunks(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces that are neither tiny nor huge."""
    small = bytearray()
    for part in parts:
        if len(part) < SMALL:
            small += part
            if len(small) < SMALL:
                continue
            part = memoryview(b"")
        if small:
            yield memoryview(small)
            small = bytearray()  # the old one is still being hashed
        for i in range(0, len(part), CHUNK):
            yield part[i : i + CHUNK]
    if small:
        yield memoryview(small)


def _write_all(file: FileIO, data: memoryview) -> None:
    """An unbuffered write may take less than it was given, as before the disk is full."""
    while data:
        data = data[file.write(data) :]


def hash_of(file: BufferedReader) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal.

    What was read is hashed while it is in the core's cache: for several files at a time, this is
    faster than a second thread that reads ahead.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(SMALL))
    # The kernel reads further ahead of one that says so.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()
