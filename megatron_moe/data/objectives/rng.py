"""Random numbers that are a pure function of a key, a stream and the number of a sample.

Philox is counter-based: sample i starts at a counter of its own, so nothing has to be drawn before
it, and every worker, rank, layout and resumed run gets the same numbers. Only raw words are used:
what `numpy.random.Generator` makes of them may change between releases (NEP 19).
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
"""Numbers of a block; a multiple of 4, since one counter value gives 4 words."""


@dataclass(frozen=True)
class SampleRng:
    """The random words of one dataset.

    Args:
        key: 128 bits, from `sample_rng`.
    """

    key: int

    def words(self, stream: int, index: int, count: int) -> Words:
        """Return words 0 .. ``count`` - 1 of a sample.

        Args:
            stream: which decision of the sample they are for; streams are independent.
            index: number of the sample, below 2^64.
            count: number of words; a larger count begins with the same words.
        """
        words: Words = self._philox(stream, index).random_raw(count)
        return words

    def uniform(self, stream: int, index: int, count: int) -> Iterator[npt.NDArray[np.float64]]:
        """Yield the same words as numbers in [0, 1) with 53 bits, in blocks."""
        philox = self._philox(stream, index)
        for done in range(0, count, _BLOCK):
            words = philox.random_raw(min(_BLOCK, count - done))
            yield (words >> np.uint64(11)) * 2.0**-53

    def _philox(self, stream: int, index: int) -> np.random.Philox:
        # The counter has four 64-bit words and counts up in the lowest, from which 2^64 blocks can
        # be drawn. The index is the second word and the stream the highest, so samples and streams
        # never overlap.
        return np.random.Philox(key=self.key, counter=(stream << 192) + (index << 64))

    def permutation(self, stream: int, index: int, count: int) -> npt.NDArray[np.int64]:
        """Return a random permutation of 0 .. ``count`` - 1."""
        return np.argsort(self.words(stream, index, count), kind="stable")


def sample_rng(seed: int, *purpose: str | int) -> SampleRng:
    """Return the generator of a seed and a purpose, such as an objective and a source's content."""
    text = json.dumps([seed, *purpose])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return SampleRng(int.from_bytes(digest, "little"))
