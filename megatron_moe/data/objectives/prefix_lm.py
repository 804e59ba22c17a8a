"""Prefix LM: the samples of next-token prediction, with no loss on a prefix of random length.

The mask stays causal, as OpenMoE's is. S tokens of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_moe.data.causal import CausalDataset, Sample
from megatron_moe.data.objectives.noise import Noise, noise_of
from megatron_moe.data.objectives.ul2 import random_split


class PrefixLmDataset(CausalDataset):
    """The samples of `CausalDataset`, in its order.

    The split of a sample's S + 1 ids is uniform in 1 .. S: the first 1 .. S are the prefix, and the
    rest, at least one, is predicted.
    """

    noise: Noise

    def _description(self) -> dict[str, Any]:
        common = super()._description()
        part = (common["content"], *common["documents"])
        self.noise = noise_of(self.config.random_seed, "prefix-lm", *part)
        return common

    def __getitem__(self, idx: int) -> Sample:
        """Sample ``idx``, as `CausalDataset` gives it."""
        sample = super().__getitem__(idx)
        # The place of the sample in the text, so that a shuffle does not change its split.
        place = int(self.shuffle_index[idx])
        length = len(sample["tokens"])
        split = random_split(int(self.noise.words(0, place, 1)[0]), length + 1)
        counts = sample["loss_mask"] & (np.arange(length) >= split - 1)
        return sample | {"loss_mask": counts}
