"""What the model gets: one micro-batch of next-token prediction.

B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens_BS: Tensor
    """Input ids, int64."""
    labels_BS: Tensor
    """The id to predict at each position, int64; 0 where the mask is 0 for lack of one."""
    loss_mask_BS: Tensor
    """1.0 where the prediction counts, 0.0 elsewhere, float32."""
