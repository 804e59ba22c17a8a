"""From slots to buffer rows, in one of three layouts.

- `fixed`: row = (expert, group, slot). The same for every step, with empty rows in between: what
  one batched GEMM wants where the host may not wait for counts.
- `packed`: for each expert-parallel rank a block of fixed size, in it the filled rows sorted by
  expert, the empty ones at the end: what one GEMM per expert over its filled rows wants.
- `aligned`: the filled rows of each expert together, with room for as many as the fullest has of
  those whose GEMMs are batched with its own: what batched GEMMs want where the host knows the
  counts. For one expert-parallel rank.

Shapes: T tokens in the order of the activations (sequence, then batch), K choices, G groups,
E experts, R buffer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.moe.capacity import Capacity
from megatron_moe.moe.slots import SlotRule, Slots, by_token


@dataclass(frozen=True, kw_only=True)
class BufferLayout:
    """Where rows are.

    Args:
        kind: which of the three.
        blocks: expert-parallel ranks; block i holds the experts of rank i.
        block_rows: rows of one block.
        expert_rows: rows of one expert in `fixed`.
        starts: first row of each expert in `aligned`.
    """

    kind: Literal["fixed", "packed", "aligned"]
    blocks: int
    block_rows: int
    expert_rows: int = 0
    starts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """R."""
        return self.blocks * self.block_rows

    @classmethod
    def fixed(cls, rule: SlotRule, capacity: Capacity, blocks: int) -> BufferLayout:
        """A row for every slot of this rank."""
        expert_rows = capacity.groups * -(-capacity.slots // rule.shares)
        block_rows = rule.num_experts // blocks * expert_rows
        return cls(kind="fixed", blocks=blocks, block_rows=block_rows, expert_rows=expert_rows)

    @classmethod
    def packed(cls, rule: SlotRule, capacity: Capacity, blocks: int, choices: int) -> BufferLayout:
        """As many rows as can be filled by ``choices`` = K * T choices."""
        most = cls.fixed(rule, capacity, blocks).block_rows
        return cls(kind="packed", blocks=blocks, block_rows=min(most, choices))

    @classmethod
    def aligned(cls, expert_rows: list[int]) -> BufferLayout:
        """With these rows for each expert."""
        ends = list(accumulate(expert_rows))
        return cls(kind="aligned", blocks=1, block_rows=ends[-1], starts=(0, *ends[:-1]))


@dataclass(frozen=True)
class Plan:
    """Where each choice goes.

    Args:
        rows_TK: int64 row of each choice; 0 where this rank has no row for it.
        owned_TK: bool, whether the choice has a row on this rank.
        kept_TK: bool, whether it has a row on any rank that shares the tokens: not dropped.
        source_R: int64 token of each row; 0 in empty rows.
    """

    rows_TK: Tensor
    owned_TK: Tensor
    kept_TK: Tensor
    source_R: Tensor


def make_plan(slots: Slots, batch: int, capacity: Capacity, layout: BufferLayout) -> Plan:
    """Give each choice with a slot of this rank its row."""
    row_GA = _first_rows(slots.filled_GE, layout).gather(1, slots.experts_GA) + slots.slot_GA
    # What has no row here goes to one row past the end.
    target_TK = by_token(row_GA.where(slots.owned_GA, layout.rows), batch, capacity)
    owned_TK = target_TK < layout.rows
    kept_TK = owned_TK
    if slots.owned_GA is not slots.kept_GA:
        kept_TK = by_token(slots.kept_GA, batch, capacity)
    rows_TK = target_TK * owned_TK
    return Plan(rows_TK, owned_TK, kept_TK, _sources(target_TK, layout.rows))


def _sources(target_TK: Tensor, rows: int) -> Tensor:
    """The token of each row: the inverse of ``target_TK``. The spare row takes what has none."""
    tokens, topk = target_TK.shape
    token_A = torch.arange(tokens, device=target_TK.device).repeat_interleave(topk)
    return target_TK.new_zeros(rows + 1).scatter_(0, target_TK.reshape(-1), token_A)[:rows]


def _first_rows(filled_GE: Tensor, layout: BufferLayout) -> Tensor:
    """The buffer row of slot 0 of each group and expert."""
    groups, experts = filled_GE.shape
    device = filled_GE.device
    if layout.kind == "packed":
        filled_NE = filled_GE.sum(0).view(layout.blocks, -1)
        block_N = torch.arange(layout.blocks, device=device) * layout.block_rows
        first_E = (filled_NE.cumsum(1) - filled_NE + block_N.unsqueeze(1)).view(-1)
    elif layout.kind == "aligned":
        first_E = torch.tensor(layout.starts, device=device)
    else:
        first_E = torch.arange(experts, device=device) * layout.expert_rows
        slots = layout.expert_rows // groups
        return first_E + torch.arange(groups, device=device).unsqueeze(1) * slots
    return first_E + filled_GE.cumsum(0) - filled_GE
