"""What the model gets: one micro-batch of next-token prediction.

B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_moe.config import ObjectiveConfig

PLANES = ("tokens", "labels", "loss_mask", "positions", "documents")
"""What samples and batches may hold, in the order in which it is packed; the last two are extra."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens_BS: Tensor
    """Input ids, int64."""
    labels_BS: Tensor
    """The id to predict at each position, int64; 0 where the mask is 0 for lack of one."""
    loss_mask_BS: Tensor
    """1.0 where the prediction counts, 0.0 elsewhere, float32."""
    positions_BS: Tensor | None = None
    """Position of each token for its rotary embedding, int64; `None` counts from the row's
    start."""
    documents_BS: Tensor | None = None
    """Number of each token's document within its row, int64, never falling; attention stays within
    a document. `None` means that rows are one."""


def extra_planes(objective: ObjectiveConfig) -> tuple[str, ...]:
    """What samples and batches hold besides tokens, labels and loss mask; the same on all ranks.

    Every pipeline stage needs them, since every stage attends.
    """
    wanted = {
        "positions": objective.reset_position_ids,
        "documents": objective.reset_attention_mask,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def document_planes(
    begins: npt.NDArray[np.bool_], names: tuple[str, ...]
) -> dict[str, npt.NDArray[np.int64]]:
    """Positions and numbers of documents, [S] each, of those that are wanted.

    Args:
        begins: [S], whether a document begins at this token.
        names: from `extra_planes`.
    """
    if not names:
        return {}
    places = np.arange(len(begins))
    starts = np.maximum.accumulate(np.where(begins, places, 0))
    planes = {"positions": places - starts, "documents": np.cumsum(begins) - int(begins[0])}
    return {name: planes[name] for name in names}
