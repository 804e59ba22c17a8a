"""Cuts a stream of documents into windows of several sizes; the kind of each window is random.

The stream is one epoch after the other, each with the documents in an order of its own. The kind of
window w depends on (rng, w) alone, and the windows that start in an epoch are shuffled among
themselves. So no token is skipped, no token is used twice before all are used once, and the order
does not depend on the length of the run.

Example, documents a of 3 and b of 4 tokens, kinds of size 2 and 3:

    stream    a a a b b b b | b b b b a a a | ...       two epochs of T = 7 tokens
    window    0 0 1 1 1 2 2   3 3 4 4 4 5 5 5           kinds 2 3 2, 2 3 3
    order     2 0 1           3 5 4                     a shuffle in each epoch

Window 1 starts in document 0 of the stream (a) at token 2 and reads on into b. A window that starts
in an epoch may end in the next one; the next window starts where it ends.

T tokens of an epoch, n windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.rng import SampleRng

KIND, DOCUMENTS, ORDER = 0, 1, 2
"""Streams of the generator."""


@dataclass(frozen=True)
class Windows:
    """The windows of one source and split."""

    documents: Array
    """Documents of the stream, in order, one epoch after the other."""
    starts: Array
    """[n, 2]: start of window w, as a place in ``documents`` and a token of that document."""
    kinds: Array
    """[n], the kind of window w."""
    order: Array
    """[n], the window of each sample."""


def cut_windows(
    rng: SampleRng,
    documents: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    sizes: Sequence[int],
    weights: Sequence[float],
    samples: int,
) -> list[Array]:
    """Return the four arrays of `Windows`.

    Args:
        rng: decides kinds and orders.
        documents: numbers of the documents of an epoch.
        lengths: tokens of each; at least one is not empty.
        sizes: tokens of a window of each kind.
        weights: share of the windows of each kind, relative to the others.
        samples: number of windows that will be used; complete epochs are cut.
    """
    epoch = int(lengths.sum(dtype=np.int64))
    tokens = np.asarray(sizes, dtype=np.int64)
    # The last window that is used starts after all windows before it, in this epoch.
    epochs = int(tokens[draw_kinds(rng, weights, samples)[:-1]].sum()) // epoch + 1
    # An upper bound of the windows that start before the end of the last epoch.
    kinds = draw_kinds(rng, weights, epochs * epoch // min(sizes) + 1)
    begins = np.cumsum(tokens[kinds]) - tokens[kinds]
    count = int(np.searchsorted(begins, epochs * epoch))
    kinds, begins = kinds[:count], begins[:count]
    # The last window may end in one more epoch, of which the stream needs the documents as well.
    end = int(begins[-1] + tokens[kinds[-1]])
    places, bounds = _stream(rng, lengths, epoch, -(-end // epoch))
    # An empty document starts where the next one does; "right" skips it.
    held_by = np.searchsorted(bounds, begins, side="right") - 1
    starts = np.stack([held_by, begins - bounds[held_by]], axis=1)
    used = documents[places[: int(np.searchsorted(bounds, end))]]
    order = _shuffled(rng, np.searchsorted(begins, epoch * np.arange(epochs + 1, dtype=np.int64)))
    return [_narrow(used), _narrow(starts), kinds, _narrow(order)]


def _shuffled(rng: SampleRng, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the windows between two edges in random order, one epoch after the other."""
    sizes = np.diff(edges).tolist()
    return np.concatenate([edges[e] + rng.permutation(ORDER, e, n) for e, n in enumerate(sizes)])


def draw_kinds(rng: SampleRng, weights: Sequence[float], count: int) -> npt.NDArray[np.uint8]:
    """Return the kinds of windows 0 .. ``count`` - 1; a larger count begins with the same kinds."""
    shares = np.cumsum(weights) / np.sum(weights)
    kinds = [
        np.searchsorted(shares[:-1], block, side="right").astype(np.uint8)
        for block in rng.uniform(KIND, 0, count)
    ]
    return np.concatenate(kinds)


def _stream(
    rng: SampleRng, lengths: npt.NDArray[np.integer], epoch: int, epochs: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the places of the documents of some epochs, and the tokens before each and in all."""
    places = [rng.permutation(DOCUMENTS, e, len(lengths)) for e in range(epochs)]
    joined = np.concatenate(places)
    bounds = np.zeros(len(joined) + 1, dtype=np.int64)
    np.cumsum(lengths[joined], out=bounds[1:])
    return joined, bounds


def _narrow(values: npt.NDArray[Any]) -> Array:
    """Store as int32 where the numbers allow it, which halves the memory."""
    fits = len(values) == 0 or int(values.max()) <= np.iinfo(np.int32).max
    return values.astype(np.int32 if fits else np.int64)
