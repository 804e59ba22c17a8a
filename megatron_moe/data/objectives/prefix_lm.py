"""Prefix LM: the samples of next-token prediction, without loss on a prefix of random length.

The attention mask stays causal, as in OpenMoE. Example, S = 5, ids a b c d e f and split 3: tokens
a b c d e, labels b c d e f, loss mask 0 0 1 1 1. The prefix is a b c, and d e f are predicted.

S tokens of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_moe.data.causal import CausalDataset, Sample
from megatron_moe.data.objectives.rng import SampleRng, sample_rng
from megatron_moe.data.objectives.spans import random_split


class PrefixLmDataset(CausalDataset):
    """The samples of `CausalDataset`, in its order.

    The split of the S + 1 ids of a sample is uniform in 1 .. S; with a start token it has S ids and
    the split is in 1 .. S - 1. It is the length of the prefix; the remaining ids, at least one, are
    predicted.
    """

    rng: SampleRng

    def _description(self) -> dict[str, Any]:
        common = super()._description()
        part = (common["content"], *common["documents"])
        self.rng = sample_rng(self.config.random_seed, "prefix-lm", *part)
        return common

    def __getitem__(self, idx: int) -> Sample:
        """Return sample ``idx``; see `CausalDataset`."""
        sample = super().__getitem__(idx)
        # The place of the sample in the text, so that a shuffle does not change its split.
        place = int(self.shuffle_index[idx])
        length = len(sample["tokens"])
        # Position t predicts id t + 1 of S + 1 ids, so the first id after the prefix is predicted
        # at split - 1; after a start token id t of S ids, and at split.
        before = 1 if self.config.start is None else 0
        split = random_split(int(self.rng.words(0, place, 1)[0]), length + before)
        counts = sample["loss_mask"] & (np.arange(length) >= split - before)
        return sample | {"loss_mask": counts}
