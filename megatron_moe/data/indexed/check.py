"""Opens an indexed dataset and rejects a broken one, before any token is read.

Megatron-Core accepts a `.bin` that does not belong to its `.idx`, returns uninitialised memory for
a truncated one and trains on ids beyond the vocabulary. Two checks prevent that: this one at every
start, on every rank, in milliseconds whatever the size (magic, version, type, sizes of both files,
last offset, and a fingerprint of the content), and `scan` once per content.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.format import (
    HEADER,
    MAGIC,
    TYPES,
    VERSION,
    bounds_position,
    index_size,
    offsets_position,
    paths_of,
)
from megatron_moe.errors import UsageError
from megatron_moe.files import check_data_file

_HASHED_WHOLE = 16 << 20
"""Bytes up to which a file is hashed completely."""
_SAMPLES, _SAMPLE = 256, 64 << 10
"""Of a larger file: blocks that are hashed, and bytes of each; first and last are among them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An indexed dataset that passed the checks at open."""

    prefix: str
    type_code: int
    sequences: int
    documents: int
    tokens: int
    fingerprint: str
    """Hash of sizes, header and both files (of large files, samples); independent of the path."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the token ids."""
        return TYPES[self.type_code]

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the tokens of each sequence, memory-mapped from the index."""
        if self.sequences == 0:
            return np.zeros(0, np.int32)
        path = paths_of(self.prefix)[1]
        return np.memmap(path, np.dtype("<i4"), "r", HEADER.size, (self.sequences,))

    def document_bounds(self) -> npt.NDArray[np.int64]:
        """Return the sequences before each document, then their number, memory-mapped."""
        path = paths_of(self.prefix)[1]
        position, shape = bounds_position(self.sequences), (self.documents + 1,)
        return np.memmap(path, np.dtype("<i8"), "r", position, shape)

    def token_ids(self) -> npt.NDArray[np.integer]:
        """Return the ids of all sequences, memory-mapped from the `.bin`."""
        path = paths_of(self.prefix)[0]
        ids: npt.NDArray[np.integer] = np.memmap(path, self.dtype, "r", shape=(self.tokens,))
        return ids

    def document_of_sequence(self, sequence: int) -> int:
        """Return the document that contains a sequence, both counted from 0."""
        # Empty documents repeat a bound; the last of equal bounds is the document with sequences.
        return int(np.searchsorted(self.document_bounds(), sequence, side="right")) - 1

    def document_of_token(self, position: int) -> int:
        """Return the document that contains the token at ``position`` of the `.bin` file."""
        ends = np.cumsum(self.lengths(), dtype=np.int64)
        return self.document_of_sequence(int(np.searchsorted(ends, position, side="right")))


def inspect_source(prefix: str) -> Source:
    """Open a dataset: check headers and sizes, and hash samples of the content.

    Raises:
        UsageError: a file is missing, empty, truncated or of another format, or the two files do
            not belong together.
    """
    bin_path, idx_path = paths_of(prefix)
    for path in (idx_path, bin_path):
        check_data_file(path, "data path")
    try:
        with open(idx_path, "rb") as index, open(bin_path, "rb") as tokens:
            return _inspect(prefix, index, tokens)
    except OSError as error:
        expected = "the prefix of a readable pair PREFIX.bin, PREFIX.idx"
        raise UsageError("data path", prefix, expected, str(error)) from None


def _inspect(prefix: str, index: BinaryIO, tokens: BinaryIO) -> Source:
    idx_size, bin_size = (os.fstat(stream.fileno()).st_size for stream in (index, tokens))
    code, sequences, bounds = _read_header(index, idx_size)
    expected = index_size(sequences, bounds)
    if idx_size != expected:
        raise UsageError(
            f"size of {index.name}",
            idx_size,
            f"{expected} bytes for its {sequences} sequences and {bounds} document bounds",
            "copy or preprocess it again",
        )
    total = _indexed_bytes(index, sequences, TYPES[code].itemsize)
    if bin_size != total:
        raise UsageError(
            f"size of {tokens.name}",
            bin_size,
            f"the {total} bytes that {index.name} describes",
            "the file is truncated or belongs to another index; copy or preprocess the pair again",
        )
    if total == 0:
        raise UsageError(f"size of {tokens.name}", 0, "> 0")
    return Source(
        prefix=prefix,
        type_code=code,
        sequences=sequences,
        documents=bounds - 1,
        tokens=total // TYPES[code].itemsize,
        fingerprint=_fingerprint(index, idx_size, tokens, bin_size),
    )


def _read_header(index: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return type code, number of sequences, number of document bounds."""
    header = index.read(HEADER.size)
    if len(header) < HEADER.size:
        raise UsageError(f"size of {index.name}", size, f">= {HEADER.size} bytes, a header")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC:
        raise UsageError(f"start of {index.name}", magic, f"the magic {MAGIC!r} of an index")
    if version != VERSION:
        raise UsageError(f"version of {index.name}", version, str(VERSION))
    if code not in TYPES:
        raise UsageError(f"token type of {index.name}", code, f"one of {sorted(TYPES)} (integers)")
    if bounds < 1:
        raise UsageError(f"number of document bounds of {index.name}", bounds, ">= 1")
    return code, sequences, bounds


def _indexed_bytes(index: BinaryIO, sequences: int, itemsize: int) -> int:
    """Return the bytes of tokens up to the end of the last sequence: its offset plus its length."""
    if sequences == 0:
        return 0
    index.seek(offsets_position(sequences) - 4)
    length = int.from_bytes(index.read(4), "little", signed=True)
    index.seek(bounds_position(sequences) - 8)
    return int.from_bytes(index.read(8), "little", signed=True) + length * itemsize


def _fingerprint(index: BinaryIO, idx_size: int, tokens: BinaryIO, bin_size: int) -> str:
    digest = hashlib.blake2b(f"{idx_size} {bin_size}".encode(), digest_size=16)
    for stream, size in ((index, idx_size), (tokens, bin_size)):
        if size <= _HASHED_WHOLE:
            stream.seek(0)
            digest.update(stream.read())
            continue
        for start in np.linspace(0, size - _SAMPLE, _SAMPLES).astype(np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
