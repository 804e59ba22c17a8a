"""Span corruption: which tokens are hidden, and the inputs and targets that come of it.

Source: T5 (Raffel et al., arXiv 1910.10683, section 3.1.4) and its published preprocessing: the
tokens are an alternation of k kept and k hidden spans, starting with a kept one, in which both sets
of lengths are uniformly random partitions into non-empty parts.

L tokens of the text, k spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int64]


def span_counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Number of hidden tokens, round(L rate), and of spans k, round(hidden / mean).

    Both are at least 1, and leave a kept token for every span.
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), length - hidden)


def segment(words: npt.NDArray[np.uint64], items: int, parts: int) -> Lengths:
    """Cut ``items`` things in a row into ``parts`` non-empty parts, all ways equally likely.

    Args:
        words: ``items`` - 1 random numbers, one for each place where a cut may be.
        items: at least ``parts``.
        parts: at least 1.

    Returns:
        The lengths of the parts.
    """
    if parts == 1:
        return np.array([items], dtype=np.int64)
    # The places with the smallest numbers are a uniformly random set.
    places = np.argpartition(words[: items - 1], parts - 2)[: parts - 1]
    edges = np.empty(parts + 1, dtype=np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, np.sort(places) + 1, items
    return np.diff(edges)


def random_spans(
    words: npt.NDArray[np.uint64], length: int, rate: float, mean_span: float
) -> tuple[Lengths, Lengths]:
    """Lengths [k] of the kept and of the hidden spans of a text.

    Args:
        words: L random numbers.
        length: L, at least 2.
        rate: share of tokens to hide.
        mean_span: hidden tokens per span.
    """
    hidden, spans = span_counts(length, rate, mean_span)
    kept_lengths = segment(words[hidden:], length - hidden, spans)
    return kept_lengths, segment(words[:hidden], hidden, spans)


def corrupt(
    tokens_L: Ids, kept: Lengths, hidden: Lengths, sentinels: Sequence[int]
) -> tuple[Ids, Ids]:
    """Inputs and targets without their ends.

    Inputs: every hidden span replaced by its sentinel. Targets: every kept span replaced by the
    sentinel of the hidden span that follows it. So both hold the same k sentinels in order.

    Args:
        tokens_L: the text; its length is the sum of both lengths.
        kept: [k], from `random_spans`.
        hidden: [k].
        sentinels: at least k ids.
    """
    marks = np.asarray(sentinels[: len(kept)], dtype=np.int64)
    lengths = np.stack([kept, hidden], axis=1).ravel()
    kinds = np.zeros(len(lengths), dtype=bool)
    kinds[1::2] = True
    is_hidden = np.repeat(kinds, lengths)
    inputs: Any = np.insert(tokens_L[~is_hidden], np.cumsum(kept), marks)
    targets: Any = np.insert(tokens_L[is_hidden], np.cumsum(hidden) - hidden, marks)
    return inputs, targets
