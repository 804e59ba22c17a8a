"""Random numbers that are a pure function of a key, a lane and a sample's number.

Philox is counter-based: sample i starts at its own counter, so nothing has to be drawn before it,
and every worker, rank, layout and resumed run finds the same numbers. Only raw words are used: what
`numpy.random.Generator` makes of them may change between releases (NEP 19).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_BLOCK = 1 << 20
"""Numbers of a block; a multiple of 4, the words of one count."""


@dataclass(frozen=True)
class Noise:
    """The random words of one data set.

    Args:
        key: 128 bits, from `noise_of`.
    """

    key: int

    def words(self, lane: int, index: int, count: int) -> Words:
        """Words 0 .. ``count`` - 1 of a sample.

        Args:
            lane: which of the sample's decisions they are for; lanes are independent.
            index: the sample's number, below 2^64.
            count: how many; a larger count begins with the same words.
        """
        words: Words = self._philox(lane, index).random_raw(count)
        return words

    def uniform(self, lane: int, index: int, count: int) -> Iterator[npt.NDArray[np.float64]]:
        """Numbers in [0, 1) with 53 bits, made of the same words, in blocks."""
        philox = self._philox(lane, index)
        for done in range(0, count, _BLOCK):
            words = philox.random_raw(min(_BLOCK, count - done))
            yield (words >> np.uint64(11)) * 2.0**-53

    def _philox(self, lane: int, index: int) -> np.random.Philox:
        """The generator counts in the lowest of four 64-bit words, so samples never meet."""
        return np.random.Philox(key=self.key, counter=(lane << 192) + (index << 64))

    def order(self, lane: int, index: int, count: int) -> npt.NDArray[np.int64]:
        """A random permutation of 0 .. ``count`` - 1."""
        return np.argsort(self.words(lane, index, count), kind="stable")


def noise_of(seed: int, *what: str | int) -> Noise:
    """The noise of a seed and of what it is for, such as the content of a source."""
    text = json.dumps([seed, *what])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return Noise(int.from_bytes(digest, "little"))
