"""Refuses a broken indexed data set in one line, before anything reads tokens from it.

Megatron-Core accepts a `.bin` that does not belong to its `.idx`, returns uninitialised memory for
a truncated one and trains on ids beyond the vocabulary. Two looks are taken: this one at every
start, on every rank, in milliseconds whatever the size (magic, version, type, sizes of both files,
the last offset, and a fingerprint of the content); and `indexed_scan` once per content.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.format import HEADER, MAGIC, TYPES, VERSION, paths_of
from megatron_moe.errors import UsageError

_WHOLE = 16 << 20
"""Bytes up to which a file is hashed whole."""
_SAMPLES, _SAMPLE = 256, 64 << 10
"""Blocks, and bytes of each, hashed of a larger file; the first and last are among them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An indexed data set that looks whole."""

    prefix: str
    type_code: int
    sequences: int
    documents: int
    tokens: int
    fingerprint: str
    """Hash of sizes, header and (for large files: samples of) both files; not of the path."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the token ids."""
        return TYPES[self.type_code]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, mapped from the index."""
        if self.sequences == 0:
            return np.zeros(0, np.int32)
        path = paths_of(self.prefix)[1]
        return np.memmap(path, np.dtype("<i4"), "r", HEADER.size, (self.sequences,))


def inspect_source(prefix: str) -> Source:
    """Look at headers, sizes and samples.

    Raises:
        UsageError: a file is missing, empty, truncated, not of this format, or the two files do
            not belong together.
    """
    bin_path, idx_path = paths_of(prefix)
    try:
        with open(idx_path, "rb") as index, open(bin_path, "rb") as tokens:
            return _inspect(prefix, index, tokens)
    except OSError as error:
        expected = "the prefix of a readable pair PREFIX.bin, PREFIX.idx"
        raise UsageError("data path", prefix, expected, str(error)) from None


def _inspect(prefix: str, index: BinaryIO, tokens: BinaryIO) -> Source:
    idx_size, bin_size = (os.fstat(stream.fileno()).st_size for stream in (index, tokens))
    code, sequences, ends = _read_header(index, idx_size)
    expected = HEADER.size + 12 * sequences + 8 * ends
    if idx_size != expected:
        raise UsageError(
            f"size of {index.name}",
            idx_size,
            f"{expected} bytes for its {sequences} sequences and {ends} document bounds",
            "copy or preprocess it again",
        )
    total = _indexed_bytes(index, sequences, TYPES[code].itemsize)
    if bin_size != total:
        raise UsageError(
            f"size of {tokens.name}",
            bin_size,
            f"the {total} bytes that {index.name} describes",
            "the file is cut off or belongs to another index; copy or preprocess the pair again",
        )
    if total == 0:
        raise UsageError(f"size of {tokens.name}", 0, "at least one token")
    return Source(
        prefix=prefix,
        type_code=code,
        sequences=sequences,
        documents=ends - 1,
        tokens=total // TYPES[code].itemsize,
        fingerprint=_fingerprint(index, idx_size, tokens, bin_size),
    )


def _read_header(index: BinaryIO, size: int) -> tuple[int, int, int]:
    """Type code, sequences, document bounds."""
    header = index.read(HEADER.size)
    if len(header) < HEADER.size:
        raise UsageError(f"size of {index.name}", size, f"at least a header, {HEADER.size} bytes")
    magic, version, code, sequences, ends = HEADER.unpack(header)
    if magic != MAGIC:
        raise UsageError(f"start of {index.name}", magic, f"the magic {MAGIC!r} of an index")
    if version != VERSION:
        raise UsageError(f"version of {index.name}", version, str(VERSION))
    if code not in TYPES:
        raise UsageError(f"token type of {index.name}", code, f"one of {sorted(TYPES)} (integers)")
    if ends < 1:
        raise UsageError(f"document bounds of {index.name}", ends, "at least 1")
    return code, sequences, ends


def _indexed_bytes(index: BinaryIO, sequences: int, itemsize: int) -> int:
    """Bytes of tokens up to the end of the last sequence."""
    if sequences == 0:
        return 0
    index.seek(HEADER.size + 4 * (sequences - 1))
    length = int.from_bytes(index.read(4), "little", signed=True)
    index.seek(HEADER.size + 12 * sequences - 8)
    return int.from_bytes(index.read(8), "little", signed=True) + length * itemsize


def _fingerprint(index: BinaryIO, idx_size: int, tokens: BinaryIO, bin_size: int) -> str:
    digest = hashlib.blake2b(f"{idx_size} {bin_size}".encode(), digest_size=16)
    for stream, size in ((index, idx_size), (tokens, bin_size)):
        if size <= _WHOLE:
            stream.seek(0)
            digest.update(stream.read())
            continue
        for start in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def document_of_sequence(source: Source, sequence: int) -> int:
    """The document that a sequence belongs to, both counted from 0."""
    path, offset = paths_of(source.prefix)[1], HEADER.size + 12 * source.sequences
    bounds = np.memmap(path, np.dtype("<i8"), "r", offset, (source.documents + 1,))
    return int(np.searchsorted(bounds, sequence, side="right")) - 1
