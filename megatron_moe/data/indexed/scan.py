"""Reads an indexed dataset completely, once per content.

Checks every length, offset and document bound, and records the smallest and the largest id, so that
a vocabulary that is too small is an error before the first step. The result is kept in the index
cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.indexed.format import (
    HEADER,
    bounds_position,
    offsets_position,
    paths_of,
    read_chunks,
)
from megatron_moe.data.progress import Advance, ignore_progress
from megatron_moe.errors import UsageError

_CHUNK = 1 << 22
"""Entries in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Smallest and largest id of a dataset, and the first document (from 0) that contains each."""

    smallest: int
    smallest_document: int
    largest: int
    largest_document: int


def source_range(source: Source, cache: IndexCache) -> TokenRange:
    """Return the range of token ids of ``source``: from the cache, or by a full scan.

    Raises:
        UsageError: see `scan_source`.
    """
    values = cache.record(f"scan-{source.fingerprint}", lambda: asdict(scan_source(source)))
    return TokenRange(**values)


def check_range(source: Source, found: TokenRange, vocab_size: int) -> None:
    """Reject ids that have no row in the embedding.

    Raises:
        UsageError: names the first document with the invalid id, counted from 0.
    """
    for value, document in (
        (found.largest, found.largest_document),
        (found.smallest, found.smallest_document),
    ):
        if not 0 <= value < vocab_size:
            raise UsageError(
                f"token id in document {document} of {source.prefix}",
                value,
                f">= 0 and <= {vocab_size - 1}",
                "use the tokenizer the data was made with, or raise --vocab-size",
            )


def scan_source(source: Source, advance: Advance = ignore_progress) -> TokenRange:
    """Read the whole dataset.

    Args:
        source: from `inspect_source`.
        advance: called with the number of tokens read.

    Raises:
        UsageError: a length is negative, an offset is not the end of the previous sequence, or the
            document bounds do not rise from 0 to the number of sequences.
    """
    path = paths_of(source.prefix)[1]
    start = 0
    for first, lengths in read_chunks(path, "<i4", HEADER.size, source.sequences, _CHUNK):
        position = offsets_position(source.sequences) + 8 * first
        offsets = np.fromfile(path, "<i8", len(lengths), offset=position)
        _reject(path, "length of sequence", lengths < 0, first, lengths, ">= 0")
        ends = start + np.cumsum(lengths, dtype=np.int64) * source.dtype.itemsize
        due = ends - lengths.astype(np.int64) * source.dtype.itemsize
        _reject(path, "offset of sequence", offsets != due, first, offsets, due)
        start = int(ends[-1])
    _scan_documents(source, path)
    return _scan_tokens(source, advance)


def _reject(
    path: str,
    what: str,
    wrong: npt.NDArray[np.bool_],
    first: int,
    found: npt.NDArray[np.integer],
    expected: npt.NDArray[np.integer] | str,
) -> None:
    """Raise an error for the first wrong entry of a chunk that starts at entry ``first``."""
    if wrong.any():
        i = int(wrong.argmax())
        due = expected if isinstance(expected, str) else str(expected[i])
        raise UsageError(f"{what} {first + i} in {path}", int(found[i]), due, "preprocess it again")


def _scan_documents(source: Source, path: str) -> None:
    position, previous = bounds_position(source.sequences), 0
    for first, bounds in read_chunks(path, "<i8", position, source.documents + 1, _CHUNK):
        wrong = np.diff(bounds, prepend=previous) < 0
        if first == 0:
            wrong[0] = bounds[0] != 0
        expected = "0 for the first document and >= the bound before"
        _reject(path, "bound of document", wrong, first, bounds, expected)
        previous = int(bounds[-1])
    if previous != source.sequences:
        what = f"last document bound in {path}"
        raise UsageError(what, previous, str(source.sequences), "preprocess it again")


def _scan_tokens(source: Source, advance: Advance) -> TokenRange:
    path = paths_of(source.prefix)[0]
    low = high = (0, 0)  # id, position
    for first, ids in read_chunks(path, source.dtype.str, 0, source.tokens, _CHUNK):
        if len(ids) == 0:
            raise UsageError(f"size of {path}", "shrinking", "constant while it is read")
        at_low, at_high = int(ids.argmin()), int(ids.argmax())
        # Strict comparisons keep the first position of equal ids, so the document is the first.
        if first == 0 or ids[at_low] < low[0]:
            low = (int(ids[at_low]), first + at_low)
        if first == 0 or ids[at_high] > high[0]:
            high = (int(ids[at_high]), first + at_high)
        advance(len(ids))
    return TokenRange(
        smallest=low[0],
        smallest_document=source.document_of_token(low[1]),
        largest=high[0],
        largest_document=source.document_of_token(high[1]),
    )
