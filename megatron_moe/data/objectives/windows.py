"""Cuts a stream of documents into windows of several lengths, each window's kind drawn at random.

The stream is one epoch after the other, the documents of each in an order of its own. Window w has
a kind that depends on (noise, w) alone, and the windows that start in an epoch are shuffled among
themselves. So no token is skipped, no token is used twice before all are used once, and the order
does not depend on how long a run is.

T tokens of an epoch, n windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.noise import Noise

KIND, DOCUMENTS, ORDER = 0, 1, 2
"""Lanes of the noise."""


@dataclass(frozen=True)
class Windows:
    """The windows of one source and split."""

    documents: Array
    """Documents of the stream, in order, epochs one after the other."""
    starts: Array
    """[n, 2]: where window w starts, as a place in ``documents`` and a token of that document."""
    kinds: Array
    """[n], the kind of window w."""
    order: Array
    """[n], the window of each sample."""


def cut_windows(
    noise: Noise,
    documents: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    sizes: Sequence[int],
    weights: Sequence[float],
    samples: int,
) -> list[Array]:
    """The four arrays of `Windows`.

    Args:
        noise: decides everything.
        documents: numbers of the documents of an epoch.
        lengths: tokens of each; at least one has some.
        sizes: tokens of a window of each kind.
        weights: share of the windows of each kind, in proportion.
        samples: how many windows will be used; whole epochs are cut.
    """
    epoch = int(lengths.sum(dtype=np.int64))
    tokens = np.asarray(sizes, dtype=np.int64)
    epochs = int(tokens[draw_kinds(noise, weights, samples)[:-1]].sum()) // epoch + 1
    # Windows that start before the end of the last epoch: at most one per smallest window.
    kinds = draw_kinds(noise, weights, epochs * epoch // min(sizes) + 1)
    begins = np.cumsum(tokens[kinds]) - tokens[kinds]
    count = int(np.searchsorted(begins, epochs * epoch))
    kinds, begins = kinds[:count], begins[:count]
    end = int(begins[-1] + tokens[kinds[-1]])
    places, bounds = _stream(noise, lengths, epoch, -(-end // epoch))
    # An empty document starts where the next one does; "right" passes over it.
    held_by = np.searchsorted(bounds, begins, side="right") - 1
    starts = np.stack([held_by, begins - bounds[held_by]], axis=1)
    used = documents[places[: int(np.searchsorted(bounds, end))]]
    order = _shuffled(noise, np.searchsorted(begins, epoch * np.arange(epochs + 1, dtype=np.int64)))
    return [_narrow(used), _narrow(starts), kinds, _narrow(order)]


def _shuffled(noise: Noise, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The windows between two edges in random order, one epoch after the other."""
    sizes = np.diff(edges).tolist()
    return np.concatenate([edges[e] + noise.order(ORDER, e, n) for e, n in enumerate(sizes)])


def draw_kinds(noise: Noise, weights: Sequence[float], count: int) -> npt.NDArray[np.uint8]:
    """The kinds of windows 0 .. ``count`` - 1; a larger count begins with the same."""
    shares = np.cumsum(weights) / np.sum(weights)
    kinds = [
        np.searchsorted(shares[:-1], block, side="right").astype(np.uint8)
        for block in noise.uniform(KIND, 0, count)
    ]
    return np.concatenate(kinds)


def _stream(
    noise: Noise, lengths: npt.NDArray[np.integer], epoch: int, epochs: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the documents of some epochs, and the tokens before each and before the end."""
    places = [noise.order(DOCUMENTS, e, len(lengths)) for e in range(epochs)]
    joined = np.concatenate(places)
    bounds = np.zeros(len(joined) + 1, dtype=np.int64)
    np.cumsum(lengths[joined], out=bounds[1:])
    return joined, bounds


def _narrow(values: npt.NDArray[Any]) -> Array:
    """Half the memory where the numbers allow it."""
    fits = len(values) == 0 or int(values.max()) <= np.iinfo(np.int32).max
    return values.astype(np.int32 if fits else np.int64)
