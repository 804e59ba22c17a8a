"""`--moe-router-force-load-balancing`: experts chosen at random, for benchmarks alone.

The speed of a layer depends on how even the choices are, and an untrained router's are not. Random
ones are, but no model routes like that: a figure measured with them belongs next to one with real
routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.moe.scoring import Scores


def force_balance(
    scores: Scores, layer_number: int, weights_of: Callable[[Tensor, Tensor], Tensor]
) -> Scores:
    """The scores with k distinct experts drawn uniformly for each token.

    The weights are the router's own of these experts, so that its gradient costs
    what it costs otherwise. The draw is the same in every pass of a layer: recomputation must
    repeat it.

    Args:
        scores: of a router.
        layer_number: 0-based; each layer has a draw of its own.
        weights_of: `Router.weights_of`.
    """
    probs_TE = scores.probs_TE
    generator = torch.Generator(probs_TE.device).manual_seed(layer_number)
    drawn_TE = torch.rand(probs_TE.shape, generator=generator, device=probs_TE.device)
    choices_TK = drawn_TE.topk(scores.choices_TK.shape[1], dim=1).indices
    weights_TK = weights_of(scores.raw_TE, choices_TK)
    return replace(scores, choices_TK=choices_TK, weights_TK=weights_TK, balance_TK=None)
