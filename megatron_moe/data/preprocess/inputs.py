"""The input files of a dataset, and how they are cut into partitions.

The format of a file follows from its suffix. A partition is a list of consecutive `FileSlice`s:
byte ranges of plain JSON Lines, complete files of all other formats. Partitions hold the documents
in order, so the merged output does not depend on their number.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_moe.errors import UsageError
from megatron_moe.files import check_data_file

FileFormat = Literal["lines", "gzip", "zstd", "parquet", "text"]
TextDocuments = Literal["file", "block"]
SUFFIXES: dict[str, FileFormat] = {
    ".jsonl": "lines",
    ".json": "lines",
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
    ".parquet": "parquet",
    ".txt": "text",
    ".ndjson": "lines",
    ".ndjson.gz": "gzip",
    ".ndjson.zst": "zstd",
}
"""Format by the end of the file name, in upper or lower case."""
_HASHED_WHOLE = 16 << 20
"""Bytes up to which a file is hashed completely."""
_SAMPLES, _SAMPLE = 256, 64 << 10
"""Of a larger file: blocks that are hashed, and bytes of each."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file of a known format."""

    path: str
    format: FileFormat
    size: int
    hash: str
    """BLAKE2b of the size and the content; of a file over 16 MiB, of 256 blocks of 64 KiB."""


@dataclass(frozen=True, kw_only=True)
class FileSlice:
    """Bytes ``start`` to ``end`` of a file; complete lines if it is not the complete file."""

    file: InputFile
    start: int
    end: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Return the files of names and globs, in the order given; those of a glob are sorted.

    Raises:
        UsageError: a glob matches nothing, or a file is unreadable, given twice, has an unknown
            suffix, or is a named pipe or a Git LFS pointer.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UsageError("--input", pattern, "a readable file or a glob that matches files")
        paths += found
    counts = Counter(map(os.path.realpath, paths))
    twice = [path for path in paths if counts[os.path.realpath(path)] > 1]
    if twice:
        raise UsageError("--input", twice[0], "given once")
    return [_describe(path) for path in paths]


def _describe(path: str) -> InputFile:
    longest_first = sorted(SUFFIXES, key=len, reverse=True)
    suffix = next((s for s in longest_first if path.lower().endswith(s)), None)
    if suffix is None:
        raise UsageError("--input", path, f"a name that ends in one of {' '.join(SUFFIXES)}")
    check_data_file(path, "--input")
    try:
        return InputFile(
            path=path, format=SUFFIXES[suffix], size=os.stat(path).st_size, hash=content_hash(path)
        )
    except OSError as error:
        raise UsageError("--input", path, "a readable file", str(error)) from None


def content_hash(path: str) -> str:
    """Compute `InputFile.hash`. A change of a large file between the blocks is not detected."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        if size <= _HASHED_WHOLE:
            digest.update(stream.read())
            return digest.hexdigest()
        for start in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def cut(files: Sequence[InputFile], partitions: int) -> list[list[FileSlice]]:
    """Cut the files into ``partitions`` of about equal bytes. Some may be empty.

    Example: files of 100 and 50 bytes of JSON Lines in 3 partitions have bounds 0, 50 and 100. The
    first file is cut at the first line that starts at byte 50 or later, and the second file is
    partition 2. A compressed file of 100 bytes cannot be cut: it is partition 0, and 1 is empty.
    """
    total = sum(file.size for file in files)
    bounds = [total * i // partitions for i in range(partitions)]
    parts: list[list[FileSlice]] = [[] for _ in bounds]
    before = 0
    for file in files:
        inside = [i for i, at in enumerate(bounds) if before < at < before + file.size]
        if file.format != "lines":
            inside = []
        cuts = [0, *(_line_start(file.path, bounds[i] - before) for i in inside), file.size]
        first = max(i for i, at in enumerate(bounds) if at <= before)
        for number, (start, end) in enumerate(pairwise(cuts), first):
            if end > start:
                parts[number].append(FileSlice(file=file, start=start, end=end))
        before += file.size
    return parts


def _line_start(path: str, position: int) -> int:
    """Return the first line start at or after a position."""
    with open(path, "rb") as stream:
        stream.seek(position - 1)
        while not (line := stream.readline(1 << 20)).endswith(b"\n") and line:
            pass  # a line of any length, in bounded memory
        return stream.tell()


def lines_before(path: str, position: int) -> int:
    """Count the line ends before a position; called only to name a line in an error."""
    count = 0
    with open(path, "rb") as stream:
        while position > 0 and (block := stream.read(min(1 << 20, position))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def check_unchanged(files: Sequence[InputFile]) -> None:
    """Reject files that have changed since they were hashed.

    Raises:
        UsageError: a file's size or content has changed.
    """
    for file in files:
        try:
            found = content_hash(file.path)
        except OSError as error:
            raise UsageError("--input", file.path, "a readable file", str(error)) from None
        if found != file.hash:
            raise UsageError(
                f"hash of {file.path}", found, file.hash, "the file changed while it was read"
            )
