"""The drop policy `random`: another order of tokens in every step.

All first choices come before all second ones, as in `position`, each in an order of its own. So
which tokens lose a choice is a matter of chance: over steps, no place of a row is favoured, and no
token is trained less because it stands late.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.moe.dropping import DROP_POLICIES, Competition
from megatron_moe.moe.mixing import mix, uniform_bits


@DROP_POLICIES.register("random")
def by_random_order(competition: Competition) -> Tensor:
    """An order of the tokens of a group for each rank of choice, from (seed, step, layer).

    All groups of a step have the same orders, so that they do not depend on the layout or on the
    size of micro-batches.

    Example, 4 tokens, K = 2, orders 2 0 3 1 and 1 3 2 0: the queue is the first choices of tokens
    2, 0, 3 and 1, then the second choices of 1, 3, 2 and 0: the indices 2 0 3 1 5 7 6 4.
    """
    experts_GA, topk, draw = competition.experts_GA, competition.topk, competition.draw
    groups, choices = experts_GA.shape
    tokens, device = choices // topk, experts_GA.device
    key = mix(draw.seed, draw.step, draw.layer)
    # Equal numbers are in position order; of 2^32, hardly any are equal.
    order_KT = uniform_bits(choices, key, device).view(topk, tokens).argsort(dim=1, stable=True)
    first_K = torch.arange(topk, device=device) * tokens
    return (order_KT + first_K.unsqueeze(1)).view(1, -1).expand(groups, -1)
