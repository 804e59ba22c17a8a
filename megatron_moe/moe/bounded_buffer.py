"""Without a capacity, a buffer of bounded size: who gets a row when there are too few.

Nothing drops by expert, but a buffer of fixed shape must have room for every choice of the worst
case, in which all choices go to one expert-parallel rank. `--moe-dropless-buffer-factor` F bounds
the rows for a rank to F times the even load. Choices past the bound overflow: they are dropped in
the order of `--moe-token-drop-policy`, counted like any drop, and reported.

The bound holds for what one rank sends to another, since the exchange has equal, fixed sizes: with
expert parallelism, the tokens that compete for rows are those that one rank dispatches, so who
overflows depends on the layout. Where nothing overflows, results do not.

Shapes: T tokens, K choices, G groups, A = K * (tokens of a group) choices of a group in priority
order, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_kernels.operations import RankInExpert
from megatron_moe.config import MoEConfig
from megatron_moe.moe.dropping import OUTSIDE_TRAINING, Draw
from megatron_moe.moe.plan import Capacity, SlotRule, Slots, choices_in_order


@dataclass(frozen=True, kw_only=True)
class BufferBound:
    """The bound of a buffer.

    Args:
        ranks: expert-parallel ranks.
        rows: rows for each of them.
    """

    ranks: int
    rows: int


def buffer_bound(
    moe: MoEConfig, *, choices: int, ranks: int, shares: int, training: bool
) -> BufferBound | None:
    """The bound of one pass; `None` without one.

    Evaluations have none: they save nothing for a backward pass, and their losses must not depend
    on the layout. Where a pass has a capacity factor, capacity bounds the buffer.

    Args:
        moe: factors.
        choices: T K of the micro-batch.
        ranks: expert-parallel ranks.
        shares: ranks that hold the same tokens and divide them; see `SlotRule`.
        training: whether this is a training pass.
    """
    factor = moe.moe_dropless_buffer_factor
    if factor is None or not training or moe.moe_expert_capacity_factor is not None:
        return None
    # All choices are as many rows as can be needed.
    most = -(-choices // shares)
    return BufferBound(ranks=ranks, rows=min(math.ceil(factor * choices / (ranks * shares)), most))


def assign_bounded(
    choices_TK: Tensor,
    weights_TK: Tensor,
    batch: int,
    capacity: Capacity,
    rule: SlotRule,
    bound: BufferBound,
    rank_in_expert: RankInExpert,
    draw: Draw = OUTSIDE_TRAINING,
    padding_T: Tensor | None = None,
) -> Slots:
    """Rank choices within the block of their expert's rank, and keep those that have a row.

    The groups of a micro-batch take turns: first the choice of highest priority of each group, then
    the second of each. An example: one group of 4 tokens, k = 1, experts 0 and 1 on rank 0 and 2
    and 3 on rank 1. Tokens choose 0, 1, 0, 2. With F = 1.5 a rank has ceil(1.5 * 4 / 2) = 3 rows,
    enough for all. With F = 1 it has 2: token 2, the third for rank 0, overflows.

    Args:
        choices_TK: as for `assign_slots`.
        weights_TK: likewise.
        batch: likewise.
        capacity: its groups; slots are not limited.
        rule: drop policy and this rank's share.
        bound: rows for each rank.
        rank_in_expert: the kernel.
        draw: as for `assign_slots`.
        padding_T: likewise.
    """
    asked = choices_TK, weights_TK, batch, capacity, rule, rank_in_expert, draw, padding_T
    experts_GA, order_GA = choices_in_order(*asked)
    sorted_GA = experts_GA if order_GA is None else experts_GA.gather(1, order_GA)
    groups, choices = sorted_GA.shape
    in_turn_1A = sorted_GA.t().reshape(1, -1)
    local = rule.num_experts // bound.ranks
    # Padding has the id E: that of an expert of a rank past the last.
    rank_1A, _ = rank_in_expert.forward(in_turn_1A // local, bound.ranks + 1)
    rank_GA, real_GA = rank_1A.view(choices, groups).t(), sorted_GA < rule.num_experts
    kept_GA = (rank_GA < bound.rows * rule.shares) & real_GA
    owned_GA = kept_GA & (rank_GA % rule.shares == rule.share) if rule.shares > 1 else kept_GA
    # Choices without a row here count as those of an expert past the last.
    here_GA = sorted_GA.where(owned_GA, rule.num_experts).contiguous()
    slot_GA, filled_GX = rank_in_expert.forward(here_GA, rule.num_experts + 1)
    full_GE = _count(sorted_GA, kept_GA, rule.num_experts)
    if order_GA is not None:
        slot_GA, kept_GA, owned_GA = (
            torch.empty_like(x).scatter_(1, order_GA, x) for x in (slot_GA, kept_GA, owned_GA)
        )
    if rule.shares == 1:
        owned_GA = kept_GA
    return Slots(
        experts_GA=experts_GA.clamp(max=rule.num_experts - 1),
        slot_GA=slot_GA,
        owned_GA=owned_GA,
        kept_GA=kept_GA,
        load_GE=_count(sorted_GA, real_GA, rule.num_experts),
        full_GE=full_GE,
        filled_GE=filled_GX[:, : rule.num_experts],
        most=-(-capacity.slots // rule.shares),
        block_rows=bound.rows,
    )


def _count(experts_GA: Tensor, which_GA: Tensor, num_experts: int) -> Tensor:
    """How many of some choices each group and expert has, [G, E] int64; the id E counts nowhere."""
    counts_GX = experts_GA.new_zeros(experts_GA.shape[0], num_experts + 1)
    return counts_GX.scatter_add_(1, experts_GA, which_GA.long())[:, :num_experts].contiguous()
