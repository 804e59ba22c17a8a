"""Refuses a broken indexed data set in one line, before anything reads tokens from it.

Megatron-Core accepts a `.bin` that does not belong to its `.idx`, returns uninitialised memory for
a truncated one and trains on ids beyond the vocabulary. Two looks are taken:

- `inspect_source` at every start, on every rank, in milliseconds whatever the size: magic, version,
  type, sizes of both files, first and last offsets; and a fingerprint of the content.
- `scan_source` once per content (the result is kept in the index cache, `source_range`): every
  length, offset and document index, and the smallest and largest token id.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.data.index_cache import IndexCache
from megatron_moe.data.indexed_format import HEADER, MAGIC, TYPES, VERSION, paths_of
from megatron_moe.errors import UsageError

_WHOLE = 16 << 20
"""Bytes up to which a file is hashed whole."""
_SAMPLES, _SAMPLE = 256, 64 << 10
"""Blocks, and bytes of each, hashed of a larger file; the first and last are among them."""
_CHUNK = 1 << 22
"""Entries that a scan holds at once."""


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


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Smallest and largest token id of a data set, and the documents (from 0) they are first in."""

    smallest: int
    smallest_document: int
    largest: int
    largest_document: int


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


def source_range(source: Source, cache: IndexCache) -> TokenRange:
    """The range of token ids of ``source``: from the cache, or by a scan of all of it.

    Raises:
        UsageError: see `scan_source`.
    """
    values = cache.record(f"scan-{source.fingerprint}", lambda: asdict(scan_source(source)))
    return TokenRange(**values)


def check_range(source: Source, found: TokenRange, vocab_size: int) -> None:
    """Refuse ids that the embedding has no row for.

    Raises:
        UsageError: names the first document that holds the offending id, counted from 0.
    """
    for value, document in (
        (found.largest, found.largest_document),
        (found.smallest, found.smallest_document),
    ):
        if not 0 <= value < vocab_size:
            raise UsageError(
                f"token id in document {document} of {source.prefix}",
                value,
                f"an id from 0 to {vocab_size - 1}",
                "use the tokenizer the data was made with, or raise --vocab-size",
            )


def scan_source(source: Source) -> TokenRange:
    """Read the whole data set once.

    Raises:
        UsageError: a length is negative, an offset is not where the previous sequence ends, or the
            document bounds do not rise from 0 to the number of sequences.
    """
    path = paths_of(source.prefix)[1]
    start = 0
    for first, lengths in _index_chunks(path, "<i4", HEADER.size, source.sequences):
        offsets = np.fromfile(
            path, "<i8", len(lengths), offset=HEADER.size + 4 * source.sequences + 8 * first
        )
        _refuse_index(path, "length of sequence", lengths < 0, first, lengths, "0 or more")
        following = start + np.cumsum(lengths, dtype=np.int64) * source.dtype.itemsize
        due = following - lengths.astype(np.int64) * source.dtype.itemsize
        _refuse_index(path, "offset of sequence", offsets != due, first, offsets, due)
        start = int(following[-1])
    _scan_documents(source, path)
    return _scan_tokens(source)


def _index_chunks(
    path: str, kind: str, offset: int, count: int
) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
    for first in range(0, count, _CHUNK):
        wanted = min(_CHUNK, count - first)
        size = np.dtype(kind).itemsize
        yield first, np.fromfile(path, kind, wanted, offset=offset + size * first)


def _refuse_index(
    path: str,
    what: str,
    wrong: npt.NDArray[np.bool_],
    first: int,
    found: npt.NDArray[np.integer],
    expected: npt.NDArray[np.integer] | str,
) -> None:
    if wrong.any():
        i = int(wrong.argmax())
        due = expected if isinstance(expected, str) else str(expected[i])
        raise UsageError(f"{what} {first + i} in {path}", int(found[i]), due, "preprocess it again")


def _scan_documents(source: Source, path: str) -> None:
    offset, previous = HEADER.size + 12 * source.sequences, 0
    for first, ends in _index_chunks(path, "<i8", offset, source.documents + 1):
        rising = np.diff(ends, prepend=previous) < 0
        if first == 0:
            rising[0] = ends[0] != 0
        _refuse_index(path, "bound of document", rising, first, ends, "not below the one before")
        previous = int(ends[-1])
    if previous != source.sequences:
        what = f"last document bound in {path}"
        raise UsageError(what, previous, str(source.sequences), "preprocess it again")


def _scan_tokens(source: Source) -> TokenRange:
    path = paths_of(source.prefix)[0]
    low = high = (0, 0)
    for first, ids in _index_chunks(path, source.dtype.str, 0, source.tokens):
        if len(ids) == 0:
            raise UsageError(f"size of {path}", "shrinking", "a file nobody writes to")
        at_low, at_high = int(ids.argmin()), int(ids.argmax())
        if first == 0 or ids[at_low] < low[0]:
            low = (int(ids[at_low]), first + at_low)
        if first == 0 or ids[at_high] > high[0]:
            high = (int(ids[at_high]), first + at_high)
    return TokenRange(
        smallest=low[0],
        smallest_document=_document_of(source, low[1]),
        largest=high[0],
        largest_document=_document_of(source, high[1]),
    )


def _document_of(source: Source, position: int) -> int:
    """The document that holds the token at ``position`` of the `.bin` file."""
    ends = np.cumsum(source.lengths(), dtype=np.int64)
    sequence = int(np.searchsorted(ends, position, side="right"))
    return document_of_sequence(source, sequence)


def document_of_sequence(source: Source, sequence: int) -> int:
    """The document that a sequence belongs to, both counted from 0."""
    path, offset = paths_of(source.prefix)[1], HEADER.size + 12 * source.sequences
    bounds = np.memmap(path, np.dtype("<i8"), "r", offset, (source.documents + 1,))
    return int(np.searchsorted(bounds, sequence, side="right")) - 1
