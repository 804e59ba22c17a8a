"""Files on the disk: written once, hashed on the way, synced; checked and read back.

Hashing releases the interpreter's lock, as reading and writing do, so several files are written or
read at a time, and a file that is written is hashed by a second thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.files import open_regular, read_small
from megatron_moe.text import json_value

CHUNK = 16 << 20
"""Bytes written at a time."""
SMALL = 1 << 20
"""Shorter parts are joined up to about this many bytes, since each chunk has a fixed cost."""
Stream = Callable[[], Iterator[memoryview]]
"""Starts an iteration over the bytes of a file, in parts of any size."""
_FILES = 4
"""Files written at a time, if there are as many cores."""
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_AHEAD = 2
"""Chunks that writing may be ahead of hashing."""


@dataclass(frozen=True)
class FileRecord:
    """The manifest's entry for one file."""

    sha256: str
    bytes: int


class Stopped(Exception):
    """A write was stopped on request; its file is incomplete."""


def write_stream(path: Path, parts: Iterator[memoryview], stop: Event | None = None) -> FileRecord:
    """Write a new file and sync it to the disk.

    Args:
        path: a file that does not exist.
        parts: its bytes, in parts of any size. At most the last few are kept in memory.
        stop: once this is set, the write stops at the next chunk.

    Raises:
        OSError: the disk is full, or any other failure.
        Stopped: ``stop`` was set.
    """
    digest, total = hashlib.sha256(), 0
    hashing: deque[Future[None]] = deque()
    chunks = _chunks(parts)
    # Three threads: one produces parts (copies from a GPU, makes them contiguous), one writes, one
    # hashes. A single maker thread keeps the iterator sequential.
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
    """`write_stream` for several files, a few at a time; if one fails, the others stop.

    Raises:
        OSError: the disk is full, or any other failure.
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
    # The cause, not the `Stopped` of the files that it stopped.
    for error in errors:
        if not isinstance(error, Stopped):
            raise error
    if errors:
        raise errors[0]
    return [task.result() for task in tasks]


def _chunks(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in chunks of about `SMALL` to `CHUNK` bytes."""
    small = bytearray()
    for part in parts:
        if len(part) < SMALL:
            small += part
            if len(small) < SMALL:
                continue
            part = memoryview(b"")
        if small:
            yield memoryview(small)
            small = bytearray()  # the yielded one is still being hashed
        for i in range(0, len(part), CHUNK):
            yield part[i : i + CHUNK]
    if small:
        yield memoryview(small)


def _write_all(file: FileIO, data: memoryview) -> None:
    """Write all of ``data``; an unbuffered write may be short, as when the disk fills up."""
    while data:
        data = data[file.write(data) :]


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a small file and sync it to the disk.

    Raises:
        OSError: the disk is full, or any other failure.
    """
    return write_stream(path, iter([memoryview(content)]))


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file and sync it to the disk.

    Raises:
        OSError: the disk is full, or any other failure.
        CheckpointError: the value is not JSON; NaN and infinity are not.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"content of {path.name}", str(error), "JSON values") from None
    return write_bytes(path, text.encode())


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace a small file atomically: readers see the old content or the new.

    Raises:
        OSError: the disk is full, or any other failure; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        write_stream(temporary, iter([memoryview(content)]))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory survive a power failure.

    File systems that cannot sync a directory answer EINVAL (CIFS, some FUSE file systems and shared
    folders of virtual machines) or that it is not supported. They order these changes themselves or
    not at all; either way there is nothing more to do, and nothing has failed.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(handle)


def free_bytes(directory: Path) -> int:
    """Bytes available to this user on the file system of a directory."""
    return shutil.disk_usage(directory).free


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        Corrupt: the file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json_value(read_small(path))
    except FileNotFoundError:
        raise Corrupt(str(path), "missing", "an existing file") from None
    except (OSError, ValueError) as error:
        raise Corrupt(str(path), str(error), "readable JSON") from None
    if not isinstance(value, dict):
        raise Corrupt(str(path), type(value).__name__, "a JSON object")
    return value


def check_file(path: Path, record: FileRecord) -> str | None:
    """Compare a file with its record; one line that names the file if it differs, else None."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path} has {size} bytes, expected {record.bytes}"
        with open_regular(path) as file:
            digest = hash_of(file)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if digest != record.sha256:
        return f"{path} has SHA-256 {digest[:16]}..., expected {record.sha256[:16]}..."
    return None


def hash_of(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal.

    Each piece is hashed while it is in the core's cache: with several files at a time, that is
    faster than a second thread that reads ahead.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(SMALL))
    # The kernel reads further ahead if it is advised that access is sequential.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()
