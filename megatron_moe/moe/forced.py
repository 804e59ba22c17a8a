"""`--moe-router-force-load-balancing`: experts chosen at random, for benchmarks alone.

The speed of a layer depends on how even the choices are, and an untrained router's are not. Random
ones are, but no model routes like that: a figure measured with them belongs next to one with real
routing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_moe.moe.router import Scores


def force_balance(scores: Scores, layer_number: int) -> Scores:
    """The scores with k distinct experts drawn uniformly for each token.

    The weights are the router's own probabilities of these experts, so that its gradient costs
    what it costs otherwise. The draw is the same in every pass of a layer: recomputation must
    repeat it.

    Args:
        scores: of a router.
        layer_number: 0-based; each layer has a draw of its own.
    """
    probs_TE = scores.probs_TE
    generator = torch.Generator(probs_TE.device).manual_seed(layer_number)
    drawn_TE = torch.rand(probs_TE.shape, generator=generator, device=probs_TE.device)
    choices_TK = drawn_TE.topk(scores.choices_TK.shape[1], dim=1).indices
    return replace(scores, choices_TK=choices_TK, weights_TK=probs_TE.gather(1, choices_TK))
