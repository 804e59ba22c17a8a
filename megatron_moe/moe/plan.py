"""From choices to buffer rows: who keeps a slot, and where.

Everything here is index arithmetic on [tokens, K] and [groups, experts] integers on the device:
no host read, no [tokens, experts, capacity] mask. Two layouts of the buffer:

- `fixed`: row = (expert, group, slot). The same for every step, with empty rows in between: what
  one batched GEMM wants.
- `packed`: for each expert-parallel rank a block of fixed size, in it the filled rows sorted by
  expert, the empty ones at the end: what one GEMM per expert over its filled rows wants.

Shapes: T tokens in the order of the activations (sequence, then batch), K choices, G groups,
A choices of one group in priority order, E experts, R buffer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.moe.capacity import Capacity


@dataclass(frozen=True, kw_only=True)
class BufferLayout:
    """How rows are arranged and which of them are this rank's.

    Args:
        num_experts: E, over all ranks.
        blocks: expert-parallel ranks; block i holds the experts of rank i.
        shares: ranks that hold the same tokens and divide the slots of each expert among them.
        share: which of these this rank is; it takes slots ``share``, ``share + shares``, ...
        packed: `packed` or `fixed`.
        policy: `--moe-token-drop-policy`.
    """

    num_experts: int
    blocks: int = 1
    shares: int = 1
    share: int = 0
    packed: bool = False
    policy: Literal["position", "probs"] = "position"

    def block_rows(self, capacity: Capacity, choices: int) -> int:
        """Rows of one block, for ``choices`` = K * T choices in all."""
        slots = -(-capacity.slots // self.shares)
        rows = self.num_experts // self.blocks * capacity.groups * slots
        return min(rows, choices) if self.packed else rows


@dataclass(frozen=True)
class Plan:
    """Where each choice goes.

    Args:
        rows_TK: int64 row of each choice; 0 where this rank has no row for it.
        owned_TK: bool, whether the choice has a row on this rank.
        kept_TK: bool, whether it has a row on any rank that shares the tokens: not dropped.
        source_R: int64 token of each row; 0 in empty rows.
        filled_E: int64 rows filled on this rank for each expert.
    """

    rows_TK: Tensor
    owned_TK: Tensor
    kept_TK: Tensor
    source_R: Tensor
    filled_E: Tensor


def make_plan(
    choices_TK: Tensor,
    weights_TK: Tensor,
    batch: int,
    capacity: Capacity,
    layout: BufferLayout,
    rank_in_expert: ModuleType,
) -> Plan:
    """Rank choices within their group and expert, keep the first C, and give each its row.

    Args:
        choices_TK: int64 expert ids of all tokens of the micro-batch.
        weights_TK: their probabilities, used by policy `probs` alone.
        batch: sequences B; token t is position t // B of sequence t % B.
        capacity: groups and slots.
        layout: where rows are.
        rank_in_expert: the kernel.
    """
    tokens, topk = choices_TK.shape
    experts_GA = _by_priority(choices_TK, batch, capacity)
    if layout.policy == "probs":
        values_GA = _by_priority(weights_TK.detach(), batch, capacity)
        rank_GA, load_GE = _rank_by_value(experts_GA, values_GA, layout, rank_in_expert)
    else:
        rank_GA, load_GE = rank_in_expert.forward(experts_GA, layout.num_experts)
    kept_GA = rank_GA < capacity.slots
    filled_GE = load_GE.clamp(max=capacity.slots)
    slot_GA, owned_GA = rank_GA, kept_GA
    if layout.shares > 1:
        slot_GA = rank_GA // layout.shares
        owned_GA = kept_GA & (rank_GA % layout.shares == layout.share)
        filled_GE = (filled_GE + (layout.shares - 1 - layout.share)) // layout.shares
    base_GE = _first_rows(filled_GE, capacity, layout, tokens * topk)
    row_GA = base_GE.gather(1, experts_GA) + slot_GA
    rows = layout.blocks * layout.block_rows(capacity, tokens * topk)
    rows_TK, owned_TK, kept_TK = (
        _by_token(t, batch, topk, capacity)
        for t in (row_GA.masked_fill(~owned_GA, 0), owned_GA, kept_GA)
    )
    source_R = _sources(rows_TK, owned_TK, rows)
    return Plan(rows_TK, owned_TK, kept_TK, source_R, filled_GE.sum(0))


def _sources(rows_TK: Tensor, owned_TK: Tensor, rows: int) -> Tensor:
    """The token of each row: the inverse of ``rows_TK``. One spare row takes what has no row."""
    tokens, topk = rows_TK.shape
    token_TK = torch.arange(tokens, device=rows_TK.device).unsqueeze(1).expand(tokens, topk)
    target_TK = rows_TK.masked_fill(~owned_TK, rows)
    spare = rows_TK.new_zeros(rows + 1)
    return spare.scatter_(0, target_TK.reshape(-1), token_TK.reshape(-1))[:rows]


def _by_priority(value_TK: Tensor, batch: int, capacity: Capacity) -> Tensor:
    """[T, K] to [G, A]: tokens row by row, and all first choices before all second ones."""
    tokens, topk = value_TK.shape
    rows_BSK = value_TK.view(tokens // batch, batch, topk).transpose(0, 1)
    groups_GTK = rows_BSK.reshape(capacity.groups, capacity.group_size, topk)
    return groups_GTK.transpose(1, 2).reshape(capacity.groups, topk * capacity.group_size)


def _by_token(value_GA: Tensor, batch: int, topk: int, capacity: Capacity) -> Tensor:
    """The inverse of `_by_priority`."""
    groups_GKT = value_GA.view(capacity.groups, topk, capacity.group_size)
    tokens = capacity.groups * capacity.group_size
    rows_BSK = groups_GKT.transpose(1, 2).reshape(batch, tokens // batch, topk)
    return rows_BSK.transpose(0, 1).reshape(tokens, topk)


def _rank_by_value(
    experts_GA: Tensor, values_GA: Tensor, layout: BufferLayout, rank_in_expert: ModuleType
) -> tuple[Tensor, Tensor]:
    """Ranks with the highest value first; equal values keep their priority order."""
    order_GA = values_GA.argsort(dim=1, descending=True, stable=True)
    sorted_GA = experts_GA.gather(1, order_GA)
    rank_GA, load_GE = rank_in_expert.forward(sorted_GA, layout.num_experts)
    return torch.empty_like(rank_GA).scatter_(1, order_GA, rank_GA), load_GE


def _first_rows(
    filled_GE: Tensor, capacity: Capacity, layout: BufferLayout, choices: int
) -> Tensor:
    """The buffer row of slot 0 of each group and expert."""
    groups, experts = filled_GE.shape
    device = filled_GE.device
    if not layout.packed:
        slots = -(-capacity.slots // layout.shares)
        first_E = torch.arange(experts, device=device) * (groups * slots)
        return first_E + torch.arange(groups, device=device).unsqueeze(1) * slots
    filled_NE = filled_GE.sum(0).view(layout.blocks, -1)
    block_N = torch.arange(layout.blocks, device=device) * layout.block_rows(capacity, choices)
    first_E = (filled_NE.cumsum(1) - filled_NE + block_N.unsqueeze(1)).view(-1)
    return first_E + filled_GE.cumsum(0) - filled_GE
