"""Statistics, single documents, a full check and a comparison of indexed datasets.

Tokens are memory-mapped; of the index, about 20 bytes per sequence are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.check import Source
from megatron_moe.data.indexed.manifest import files_fit, read_manifest
from megatron_moe.data.indexed.scan import TokenRange, check_range, scan_source
from megatron_moe.data.progress import Advance, ignore_progress
from megatron_moe.errors import UsageError

_CHUNK = 1 << 22
"""Tokens that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a dataset contains. Lengths are in tokens."""

    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    shortest: int
    median: int
    longest: int
    """Lengths of the documents that are not empty."""


def statistics(source: Source) -> Statistics:
    """Count and measure the documents."""
    ends = np.append(0, np.cumsum(source.lengths(), dtype=np.int64))
    lengths = np.diff(ends[np.asarray(source.document_bounds())])
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
    """Return the ids of each sequence of a document, counted from 0.

    Raises:
        UsageError: there is no such document.
    """
    if not 0 <= number < source.documents:
        raise UsageError("--document", number, f">= 0 and <= {source.documents - 1}")
    first, last = (int(bound) for bound in source.document_bounds()[number : number + 2])
    lengths = source.lengths()[first:last]
    start = int(np.sum(source.lengths()[:first], dtype=np.int64))
    tokens = source.token_ids()
    cuts = np.append(start, start + np.cumsum(lengths, dtype=np.int64))
    return [np.array(tokens[a:b]) for a, b in pairwise(cuts)]


def verify(
    source: Source, vocab_size: int | None, advance: Advance = ignore_progress
) -> TokenRange:
    """Read everything: check every length, offset and bound, and that ids are in the vocabulary.

    Args:
        source: from `inspect_source`.
        vocab_size: `None` takes that of the manifest, if there is one.
        advance: called with the number of tokens read.

    Raises:
        UsageError: names what is wrong, and where.
    """
    manifest = read_manifest(source.prefix)
    found = scan_source(source, advance)
    if manifest is not None and not files_fit(source.prefix, manifest):
        raise UsageError(
            f"content of {source.prefix}",
            f"{source.documents} documents, {source.tokens} tokens",
            f"that of its manifest, {manifest.documents} documents and {manifest.tokens} tokens",
        )
    limit = vocab_size or (manifest.vocab_size if manifest else None)
    if limit is not None:
        check_range(source, found, limit)
    return found


def first_difference(one: Source, other: Source, advance: Advance = ignore_progress) -> str:
    """Describe the first difference of two datasets; empty if they hold the same documents.

    The type of the ids is not compared: the same ids in 16 and in 32 bits are the same.
    """
    for name in ("documents", "sequences", "tokens"):
        found, expected = getattr(one, name), getattr(other, name)
        if found != expected:
            return f"{found} and {expected} {name}"
    for name, left, right in (
        ("bounds of document", one.document_bounds(), other.document_bounds()),
        ("length of sequence", one.lengths(), other.lengths()),
        ("token", one.token_ids(), other.token_ids()),
    ):
        for first in range(0, len(left), _CHUNK):
            unlike = np.flatnonzero(left[first : first + _CHUNK] != right[first : first + _CHUNK])
            if len(unlike):
                at = first + int(unlike[0])
                place = f" (in document {one.document_of_token(at)})" if name == "token" else ""
                return f"{name} {at}{place}: {left[at]} and {right[at]}"
            if name == "token":
                advance(min(_CHUNK, len(left) - first))
    return ""


def prefix_of(name: str) -> str:
    """Return the prefix of a dataset that is given by prefix or by one of its two files."""
    return name.removesuffix(".bin").removesuffix(".idx")
