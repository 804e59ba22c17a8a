"""Reads an indexed data set from end to end, once per content.

Every length, offset and document bound has to be in its place; the smallest and the largest id are
noted, so that a vocabulary that is too small is refused before the first step. The result stays in
the index cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import Source, document_of_sequence
from megatron_moe.data.indexed.format import HEADER, paths_of
from megatron_moe.data.preprocess.progress import Advance, nobody
from megatron_moe.errors import UsageError

_CHUNK = 1 << 22
"""Entries that are held at once."""


@dataclass(frozen=True, kw_only=True)
class TokenRange:
    """Smallest and largest token id of a data set, and the documents (from 0) they are first in."""

    smallest: int
    smallest_document: int
    largest: int
    largest_document: int


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


def scan_source(source: Source, advance: Advance = nobody) -> TokenRange:
    """Read the whole data set once.

    Args:
        source: what `inspect_source` has found.
        advance: is told the tokens that were read.

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
    return _scan_tokens(source, advance)


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


def _scan_tokens(source: Source, advance: Advance) -> TokenRange:
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
        advance(len(ids))
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
