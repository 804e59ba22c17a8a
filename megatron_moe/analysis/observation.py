"""What one forward pass of a batch shows of an MoE model: choices, scores, inputs, losses.

Collectors and analyses read these records and know neither the model's format nor its family.

Shapes: B rows, S tokens of a row, T = B S tokens row by row, E experts, K choices, H hidden,
N tokens whose inputs are recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of one domain.

    Args:
        tokens_BS: ids that the model reads, int64.
        next_BS: the id that follows each of them in the text.
        documents_BS: number of each token's document within the domain, int64.
        domain: index in the domains of the sample.
        number: place of the batch in the sample, from 0.
    """

    tokens_BS: npt.NDArray[np.int64]
    next_BS: npt.NDArray[np.int64]
    documents_BS: npt.NDArray[np.int64]
    domain: int
    number: int

    @property
    def size(self) -> int:
        """T."""
        return self.tokens_BS.size


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Routing decisions of one layer for T tokens.

    Args:
        layer: index of the layer in the network, from 0.
        router_probs_TE: scores of all experts, fp32: softmax or sigmoid, by the family's rule.
        ids_TK: chosen experts, by decreasing weight; equal ones in the order of the experts.
        probs_TK: their scores.
        weights_TK: their combine weights, fp32.
        kept_TK: whether the choice found a slot; all true for models that drop no tokens.
        counts_E: choices per expert, before drops.
        inputs_NH: input of router and experts at the tokens that were asked for; `None` if none.
    """

    layer: int
    router_probs_TE: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    counts_E: Tensor
    inputs_NH: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One forward pass.

    Args:
        batch: its tokens.
        layers: a record for each MoE layer, in order.
        predicted_T: the most probable next id at each token; `None` if not requested.
        loss_T: cross entropy of the true next id in nats, fp32; `None` if not requested.
    """

    batch: TokenBatch
    layers: tuple[LayerRouting, ...]
    predicted_T: Tensor | None = None
    loss_T: Tensor | None = None


def at_places(x: Tensor, places: Tensor | None) -> Tensor:
    """Some tokens of activations [.., H], as [N, H] with memory of their own; all for `None`."""
    x_TH = x.flatten(0, -2)
    return x_TH if places is None else x_TH[places.to(x_TH.device)]
