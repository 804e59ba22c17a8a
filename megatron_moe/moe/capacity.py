"""How many tokens compete for how many slots of an expert. Plain integers, known before the step.

Two rules. `t5x` (the released training code): round(cf T / E) slots per group of T tokens, without
a factor k, one group per row. `port` (the PyTorch port): floor(k cf T / E) made even, one group per
micro-batch. Both have a least number of slots. No factor means that nothing is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The groups of one micro-batch.

    Args:
        group_size: tokens that compete with each other.
        groups: such groups in the micro-batch, in row order.
        slots: choices that one expert keeps of one group.
    """

    group_size: int
    groups: int
    slots: int


def capacity_of(moe: MoEConfig, *, rows: int, row_tokens: int, training: bool) -> Capacity:
    """Groups and slots for a micro-batch.

    Args:
        moe: rule, factors, group size, least capacity.
        rows: sequences B of the micro-batch.
        row_tokens: tokens S of a sequence, over all ranks that share it.
        training: whether the training or the evaluation factor applies.

    Raises:
        UsageError: the group size is no part of a row, no row and no whole number of rows.
    """
    size = group_size(moe, rows=rows, row_tokens=row_tokens)
    factor = moe.moe_expert_capacity_factor if training else moe.moe_eval_capacity_factor
    groups = rows * row_tokens // size
    return Capacity(group_size=size, groups=groups, slots=slots_per_expert(moe, size, factor))


def group_size(moe: MoEConfig, *, rows: int, row_tokens: int) -> int:
    """Tokens of one group; see `capacity_of`."""
    tokens = rows * row_tokens
    size = moe.moe_capacity_group_size
    if size is None:
        return row_tokens if moe.moe_capacity_rule == "t5x" else tokens
    if size > 0 and (row_tokens % size == 0 or (size % row_tokens == 0 and tokens % size == 0)):
        return size
    expected = (
        f"a divisor of the row ({row_tokens} tokens) or rows dividing the micro-batch ({rows} rows)"
    )
    raise UsageError("--moe-capacity-group-size", size, expected)


def slots_per_expert(moe: MoEConfig, tokens: int, factor: float | None) -> int:
    """Slots C of one expert for a group of ``tokens`` tokens.

    Never more than ``tokens``: a token chooses an expert at most once, so more cannot fill.
    """
    if factor is None:
        return tokens
    if moe.moe_capacity_rule == "t5x":
        slots = round(factor * tokens / moe.num_experts)
    else:
        slots = math.floor(moe.moe_router_topk * factor * tokens / moe.num_experts)
        slots += slots % 2
    return min(max(slots, moe.moe_min_capacity), tokens)
