"""The drop policy `fair`: every choice of an expert has the same chance of a slot, without chance.

All first choices come before all second ones, as in `position`. Where some of the m choices of one
rank at one expert must drop, C < m of them are taken by systematic sampling: number r of the m, in
token order, is kept if and only if

    (r C + o) mod m >= m - C,    o = floor(m u)

which is where the sum of C / m from number to number passes an integer. Two facts follow.

1. Even within a group: C of the m are kept, and of any L consecutive ones L C / m, rounded down or
   up. `position` keeps the first C.
2. Equal between choices: as o goes through 0, ..., m - 1, so does (r C + o) mod m whatever r is, so
   each choice is kept at exactly C of the m values of o.

u goes around [0, 1) in steps of the golden ratio, training step by training step: of all sequences
of that form the most even one (Knuth, TAOCP 3, section 6.4, theorem S). Each choice of a group that
came again and again would be kept in C / m of the steps to within a few of them, instead of the
square root of their number as by chance.

Shapes: G groups, K choices of a token, E experts, T tokens of a group, A = K * T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.moe.dropping import DROP_POLICIES, Competition
from megatron_moe.moe.mixing import mix, uniform_bits

GOLDEN = 2654435769
"""2^32 over the golden ratio: u is this many 2^-32 further in each step."""


@DROP_POLICIES.register("fair")
def by_fair_share(competition: Competition) -> Tensor:
    """Choices that are kept in position order, then the others.

    Example: expert 0 is the first choice of tokens 0 to 4 and has C = 2 slots. With o = 0, r C is
    0 2 4 6 8, mod 5 it is 0 2 4 1 3, and 4 and 3 are at least 5 - 2: tokens 2 and 4 stay. With
    o = 1 it is 1 3 0 2 4: tokens 1 and 4.
    """
    return (~kept_fairly(competition)).int().argsort(dim=1, stable=True)


def kept_fairly(competition: Competition) -> Tensor:
    """Which choices get a slot, [G, A] bool."""
    experts_GA, topk, experts = (
        competition.experts_GA,
        competition.topk,
        competition.num_experts,
    )
    groups = experts_GA.shape[0]
    rank_GA, _ = competition.rank_in_expert.forward(experts_GA, experts)
    experts_GKT = experts_GA.reshape(groups, topk, -1)
    load_GKE = experts_GKT.new_zeros(groups, topk, experts)
    load_GKE.scatter_add_(2, experts_GKT, experts_GKT.new_ones(1).expand_as(experts_GKT))
    before_GKE = load_GKE.cumsum(1) - load_GKE
    kept_GKE = (competition.slots - before_GKE).clamp(min=0).minimum(load_GKE)
    offset_GKE = (_turns(competition, experts_GA) * load_GKE) >> 32

    def of_choice(value_GKE: Tensor) -> Tensor:
        return value_GKE.gather(2, experts_GKT).view(groups, -1)

    load_GA, kept_GA = of_choice(load_GKE), of_choice(kept_GKE)
    number_GA = rank_GA - of_choice(before_GKE)
    return (number_GA * kept_GA + of_choice(offset_GKE)) % load_GA >= load_GA - kept_GA


def _turns(competition: Competition, like: Tensor) -> Tensor:
    """The u of each rank of choice and expert in units of 2^-32, [K, E] int64.

    Each has a start of its own, so that tokens do not lose all their choices at once.
    """
    draw, topk, experts = competition.draw, competition.topk, competition.num_experts
    starts = [uniform_bits(experts, mix(draw.layer, k), like.device) for k in range(topk)]
    return (torch.stack(starts) + draw.step * GOLDEN % 2**32) & (2**32 - 1)
