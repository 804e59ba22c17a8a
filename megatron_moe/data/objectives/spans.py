"""Span corruption: which tokens of a text are hidden, and the inputs and targets that result.

Source: T5 (Raffel et al., arXiv 1910.10683, section 3.1.4) and its published preprocessing: the
text alternates between k kept and k hidden spans, starting with a kept one. Both lists of lengths
are uniformly random partitions into non-empty parts.

Example, L = 10 tokens, rate 0.5, mean span 3: 5 hidden tokens in round(5 / 3) = 2 spans. With kept
lengths 2 3, hidden lengths 1 4 and sentinels <0> <1>:

    text      a b [c] d e f [g h i j]
    inputs    a b <0> d e f <1>
    targets   <0> c <1> g h i j

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
    """Return the number of hidden tokens, round(L rate), and of spans k, round(hidden / mean).

    Both are at least 1, and leave at least one kept token for every span.
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), length - hidden)


def random_partition(words: npt.NDArray[np.uint64], items: int, parts: int) -> Lengths:
    """Partition ``items`` items in a row into ``parts`` non-empty parts, uniformly at random.

    Example: 5 items and 3 parts have 4 places for 2 cuts. With words 7 2 9 4 the two smallest are
    at places 1 and 3, so the cuts are after items 2 and 4, and the lengths are 2 2 1.

    Args:
        words: ``items`` - 1 random numbers, one for each place of a possible cut.
        items: at least ``parts``.
        parts: at least 1.

    Returns:
        The lengths of the parts.
    """
    if parts == 1:
        return np.array([items], dtype=np.int64)
    # The places of the smallest numbers are a uniformly random subset, in linear time.
    places = np.argpartition(words[: items - 1], parts - 2)[: parts - 1]
    edges = np.empty(parts + 1, dtype=np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, np.sort(places) + 1, items
    return np.diff(edges)


def random_spans(
    words: npt.NDArray[np.uint64], length: int, rate: float, mean_span: float
) -> tuple[Lengths, Lengths]:
    """Return the lengths [k] of the kept and of the hidden spans of a text.

    Args:
        words: L random numbers; the first ones decide the hidden spans, the others the kept ones.
        length: L, at least 2.
        rate: share of tokens to hide.
        mean_span: hidden tokens per span.
    """
    hidden, spans = span_counts(length, rate, mean_span)
    kept_lengths = random_partition(words[hidden:], length - hidden, spans)
    return kept_lengths, random_partition(words[:hidden], hidden, spans)


def random_split(word: int, length: int) -> int:
    """Return a split uniform in 1 .. ``length`` - 1, from 64 random bits."""
    # The high half of a 128-bit product maps the word to 0 .. length - 2 without a division.
    return 1 + (word * (length - 1) >> 64)


def corrupt(
    tokens_L: Ids, kept: Lengths, hidden: Lengths, sentinels: Sequence[int]
) -> tuple[Ids, Ids]:
    """Return inputs and targets, without end-of-sequence ids.

    Inputs: every hidden span is replaced by its sentinel. Targets: every kept span is replaced by
    the sentinel of the hidden span after it. Both contain the same k sentinels in order.

    Args:
        tokens_L: the text; its length is the sum of both lists of lengths.
        kept: [k], from `random_spans`.
        hidden: [k].
        sentinels: at least k ids.
    """
    marks = np.asarray(sentinels[: len(kept)], dtype=np.int64)
    lengths = np.stack([kept, hidden], axis=1).ravel()  # kept 0, hidden 0, kept 1, hidden 1, ...
    kinds = np.zeros(len(lengths), dtype=bool)
    kinds[1::2] = True
    is_hidden = np.repeat(kinds, lengths)
    # Sentinel i follows kept span i in the inputs, and precedes hidden span i in the targets.
    inputs: Any = np.insert(tokens_L[~is_hidden], np.cumsum(kept), marks)
    targets: Any = np.insert(tokens_L[is_hidden], np.cumsum(hidden) - hidden, marks)
    return inputs, targets
