"""Which text files go into a data set, and how they are cut into partitions.

The kind of a file follows from its suffix. A partition is a run of consecutive *stretches*: ranges
of bytes of plain JSON Lines, whole files of all other kinds. Partitions hold the documents in
order, so that the merged output does not depend on their number.
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

Kind = Literal["lines", "gzip", "zstd", "parquet", "text"]
TextDocuments = Literal["file", "block"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "lines",
    ".json": "lines",
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Kind by the end of the name."""
_WHOLE, _SAMPLES, _SAMPLE = 16 << 20, 256, 64 << 10
"""Bytes up to which a file is hashed whole; blocks, and bytes of each, hashed of a larger one."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file that looks readable."""

    path: str
    kind: Kind
    size: int
    hash: str
    """BLAKE2b of the size and the content; of a file over 16 MiB, of 256 blocks of 64 KiB."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Bytes ``start`` to ``end`` of a file, whole lines where it is not the whole file."""

    file: InputFile
    start: int
    end: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that names and globs stand for: in the order given, those of a glob sorted.

    Raises:
        UsageError: a glob matches nothing, a file is unreadable, named twice, or of
            a suffix that says nothing.
    """
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UsageError("--input", pattern, "a readable file, or a glob that matches some")
        paths += found
    counts = Counter(map(os.path.realpath, paths))
    twice = [path for path in paths if counts[os.path.realpath(path)] > 1]
    if twice:
        raise UsageError("--input", twice[0], "each file once")
    return [_look_at(path) for path in paths]


def _look_at(path: str) -> InputFile:
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.endswith(s)), None)
    if suffix is None:
        raise UsageError("--input", path, f"a name ending in one of {' '.join(SUFFIXES)}")
    try:
        return InputFile(
            path=path, kind=SUFFIXES[suffix], size=os.stat(path).st_size, hash=content_hash(path)
        )
    except OSError as error:
        raise UsageError("--input", path, "a readable file", str(error)) from None


def content_hash(path: str) -> str:
    """See `InputFile.hash`. A change of a large file that misses all blocks is not seen by it."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        if size <= _WHOLE:
            digest.update(stream.read())
            return digest.hexdigest()
        for start in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def cut(files: Sequence[InputFile], partitions: int) -> list[list[Stretch]]:
    """Cut the files into ``partitions`` of about equal bytes. Some may be empty."""
    total = sum(file.size for file in files)
    bounds = [total * i // partitions for i in range(partitions)]
    parts: list[list[Stretch]] = [[] for _ in bounds]
    before = 0
    for file in files:
        inside = [i for i, at in enumerate(bounds) if before < at < before + file.size]
        if file.kind != "lines":
            inside = []
        cuts = [0, *(_line_start(file.path, bounds[i] - before) for i in inside), file.size]
        first = max(i for i, at in enumerate(bounds) if at <= before)
        for number, (start, end) in enumerate(pairwise(cuts), first):
            if end > start:
                parts[number].append(Stretch(file=file, start=start, end=end))
        before += file.size
    return parts


def _line_start(path: str, position: int) -> int:
    """The first line start at or after a position."""
    with open(path, "rb") as stream:
        stream.seek(position - 1)
        stream.readline()
        return stream.tell()


def lines_before(path: str, position: int) -> int:
    """Line ends in front of a position: only read when a line has to be named."""
    count = 0
    with open(path, "rb") as stream:
        while position > 0 and (block := stream.read(min(1 << 20, position))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def refuse_changed(files: Sequence[InputFile]) -> None:
    """Refuse files that are no longer what they were when the work began.

    Raises:
        UsageError: a file's size or content has changed.
    """
    for file in files:
        try:
            found = content_hash(file.path)
        except OSError as error:
            raise UsageError("--input", file.path, "a readable file", str(error)) from None
        if found != file.hash:
            raise UsageError("content of " + file.path, found, file.hash, "it changed while read")
