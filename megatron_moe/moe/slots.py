"""From choices to slots: who is kept, as index arithmetic on integers.

Nothing here is read by the host, and nothing has the shape [tokens, experts, capacity].
Shapes: T tokens in the order of the activations (sequence, then batch), K choices, G groups,
A choices of one group in priority order, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.moe.capacity import Capacity


@dataclass(frozen=True, kw_only=True)
class SlotRule:
    """Who keeps a slot, and which slots are this rank's.

    Args:
        num_experts: E, over all ranks.
        policy: `--moe-token-drop-policy`.
        shares: ranks that hold the same tokens and divide the slots of each expert among them.
        share: which of these this rank is; it takes slots ``share``, ``share + shares``, ...
    """

    num_experts: int
    policy: Literal["position", "probs"] = "position"
    shares: int = 1
    share: int = 0


@dataclass(frozen=True)
class Slots:
    """The slot of every choice, each group in priority order.

    Args:
        experts_GA: int64 chosen expert.
        slot_GA: int64 place among this rank's slots of that expert and group, if it is its own.
        owned_GA: bool, whether it is.
        kept_GA: bool, whether the choice has a slot on any rank: is not dropped.
        load_GE: int64 choices before drops, over all ranks that share the tokens.
        full_GE: int64 those of them that have a slot on any rank.
        filled_GE: int64 slots filled on this rank.
    """

    experts_GA: Tensor
    slot_GA: Tensor
    owned_GA: Tensor
    kept_GA: Tensor
    load_GE: Tensor
    full_GE: Tensor
    filled_GE: Tensor


def assign_slots(
    choices_TK: Tensor,
    weights_TK: Tensor,
    batch: int,
    capacity: Capacity,
    rule: SlotRule,
    rank_in_expert: ModuleType,
) -> Slots:
    """Rank choices within their group and expert, and keep the first C.

    Args:
        choices_TK: int64 expert ids of all tokens of the micro-batch.
        weights_TK: their probabilities, used by policy `probs` alone.
        batch: sequences B; token t is position t // B of sequence t % B.
        capacity: groups and slots.
        rule: as above.
        rank_in_expert: the kernel.
    """
    experts_GA = by_priority(choices_TK, batch, capacity)
    if rule.policy == "probs":
        values_GA = by_priority(weights_TK.detach(), batch, capacity)
        rank_GA, load_GE = _rank_by_value(experts_GA, values_GA, rule, rank_in_expert)
    else:
        rank_GA, load_GE = rank_in_expert.forward(experts_GA, rule.num_experts)
    kept_GA = rank_GA < capacity.slots
    full_GE = load_GE.clamp(max=capacity.slots)
    if rule.shares == 1:
        return Slots(experts_GA, rank_GA, kept_GA, kept_GA, load_GE, full_GE, full_GE)
    owned_GA = kept_GA & (rank_GA % rule.shares == rule.share)
    filled_GE = (full_GE + (rule.shares - 1 - rule.share)) // rule.shares
    slot_GA = rank_GA // rule.shares
    return Slots(experts_GA, slot_GA, owned_GA, kept_GA, load_GE, full_GE, filled_GE)


def by_priority(value_TK: Tensor, batch: int, capacity: Capacity) -> Tensor:
    """[T, K] to [G, A]: tokens row by row, and all first choices before all second ones."""
    topk, groups, size = value_TK.shape[1], capacity.groups, capacity.group_size
    if groups >= batch:  # Groups are parts of rows.
        parts = value_TK.view(groups // batch, size, batch, topk).permute(2, 0, 3, 1)
    else:  # They are whole rows.
        rows = batch // groups
        parts = value_TK.view(size // rows, groups, rows, topk).permute(1, 3, 2, 0)
    return parts.reshape(groups, topk * size)


def by_token(value_GA: Tensor, batch: int, capacity: Capacity) -> Tensor:
    """The inverse of `by_priority`."""
    groups, size = capacity.groups, capacity.group_size
    topk = value_GA.shape[1] // size
    if groups >= batch:
        parts = value_GA.view(batch, groups // batch, topk, size).permute(1, 3, 0, 2)
    else:
        rows = batch // groups
        parts = value_GA.view(groups, topk, rows, size // rows).permute(3, 0, 2, 1)
    return parts.reshape(groups * size, topk)


def _rank_by_value(
    experts_GA: Tensor, values_GA: Tensor, rule: SlotRule, rank_in_expert: ModuleType
) -> tuple[Tensor, Tensor]:
    """Ranks with the highest value first; equal values keep their priority order."""
    order_GA = values_GA.argsort(dim=1, descending=True, stable=True)
    sorted_GA = experts_GA.gather(1, order_GA)
    rank_GA, load_GE = rank_in_expert.forward(sorted_GA, rule.num_experts)
    return torch.empty_like(rank_GA).scatter_(1, order_GA, rank_GA), load_GE
