"""Looks into an indexed data set: statistics, one document, a full check, a comparison.

Tokens are mapped, never held; of the index about 20 bytes are held for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.check import Source
from megatron_moe.data.indexed.format import HEADER, paths_of
from megatron_moe.data.indexed.manifest import files_fit, read_manifest
from megatron_moe.data.indexed.scan import TokenRange, check_range, scan_source
from megatron_moe.data.preprocess.progress import Advance, nobody
from megatron_moe.errors import UsageError

_CHUNK = 1 << 22
"""Tokens that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a data set holds. Lengths are in tokens."""

    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    shortest: int
    median: int
    longest: int
    """Of the documents that are not empty."""


def bounds_of(source: Source) -> npt.NDArray[np.int64]:
    """Sequences before each document, then their number, mapped from the index."""
    offset = HEADER.size + 12 * source.sequences
    path = paths_of(source.prefix)[1]
    return np.memmap(path, np.dtype("<i8"), "r", offset, (source.documents + 1,))


def statistics(source: Source) -> Statistics:
    """Count and measure the documents."""
    bounds = bounds_of(source)
    ends = np.append(0, np.cumsum(source.lengths(), dtype=np.int64))
    lengths = np.diff(ends[np.asarray(bounds)])
    full = lengths[lengths > 0]
    return Statistics(
        documents=source.documents,
        empty_documents=int((lengths == 0).sum()),
        sequences=source.sequences,
        tokens=source.tokens,
        shortest=int(full.min()),
        median=int(np.median(full)),
        longest=int(full.max()),
    )


def document(source: Source, number: int) -> list[npt.NDArray[np.integer]]:
    """The ids of each sequence of a document, counted from 0.

    Raises:
        UsageError: there is no such document.
    """
    if not 0 <= number < source.documents:
        raise UsageError("--document", number, f"0 to {source.documents - 1}")
    first, last = (int(bound) for bound in bounds_of(source)[number : number + 2])
    lengths = source.lengths()[first:last]
    start = int(np.sum(source.lengths()[:first], dtype=np.int64))
    tokens = tokens_of(source)
    cuts = np.append(start, start + np.cumsum(lengths, dtype=np.int64))
    return [np.array(tokens[a:b]) for a, b in pairwise(cuts)]


def tokens_of(source: Source) -> npt.NDArray[np.integer]:
    """All ids, mapped from the file."""
    path = paths_of(source.prefix)[0]
    tokens: npt.NDArray[np.integer] = np.memmap(path, source.dtype, "r", shape=(source.tokens,))
    return tokens


def verify(source: Source, vocab_size: int | None, advance: Advance = nobody) -> TokenRange:
    """Read all of it: every length, offset and bound in its place, every id in the vocabulary.

    Args:
        source: what `inspect_source` has found.
        vocab_size: `None` takes the manifest's, if there is one.
        advance: is told the tokens that were read.

    Raises:
        UsageError: names what is wrong, and where.
    """
    manifest = read_manifest(source.prefix)
    found = scan_source(source, advance)
    if manifest is not None and not files_fit(source.prefix, manifest):
        words = f"{manifest.documents} documents, {manifest.tokens} tokens, as its manifest says"
        raise UsageError(
            source.prefix, f"{source.documents} documents, {source.tokens} tokens", words
        )
    limit = vocab_size or (manifest.vocab_size if manifest else None)
    if limit is not None:
        check_range(source, found, limit)
    return found


def first_difference(one: Source, other: Source, advance: Advance = nobody) -> str:
    """Where two data sets differ, in words; empty if they hold the same documents.

    The type of the ids is not compared: the same ids in 16 and in 32 bits are the same.
    """
    for name in ("documents", "sequences", "tokens"):
        found, expected = getattr(one, name), getattr(other, name)
        if found != expected:
            return f"{found} and {expected} {name}"
    for name, left, right in (
        ("bounds of document", bounds_of(one), bounds_of(other)),
        ("length of sequence", one.lengths(), other.lengths()),
        ("token", tokens_of(one), tokens_of(other)),
    ):
        for first in range(0, len(left), _CHUNK):
            unlike = np.flatnonzero(left[first : first + _CHUNK] != right[first : first + _CHUNK])
            if len(unlike):
                at = first + int(unlike[0])
                place = f" ({_place(one, at)})" if name == "token" else ""
                return f"{name} {at}{place}: {left[at]} and {right[at]}"
            if name == "token":
                advance(min(_CHUNK, len(left) - first))
    return ""


def _place(source: Source, token: int) -> str:
    ends = np.cumsum(source.lengths(), dtype=np.int64)
    sequence = int(np.searchsorted(ends, token, side="right"))
    number = int(np.searchsorted(bounds_of(source), sequence, side="right")) - 1
    return f"in document {number}"


def named(name: str) -> str:
    """The prefix that was meant, where one of the two files was named."""
    return name.removesuffix(".bin").removesuffix(".idx")
