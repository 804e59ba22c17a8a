"""From choices to buffer rows: how many slots an expert has, who gets them, where they lie.

Nothing has the shape [tokens, experts, capacity], and the host reads nothing. Three steps:

1. `capacity_of`: groups of tokens compete for C slots of every expert. Known before the step.
2. `assign_slots`: choices are ranked within their group and expert; ranks below C keep a slot.
3. `place`: slots become rows of the expert buffer, whose `BufferLayout` the experts choose.

Shapes: T tokens in the order of the activations (sequence, then batch), K choices, G groups,
A = K * (tokens of a group) choices of a group in priority order, E experts, R buffer rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fused_kernels.operations import Kernels, RankInExpert
from megatron_moe.config import MoEConfig, capacity_group_tokens
from megatron_moe.moe.chunks import SlotChunks
from megatron_moe.moe.dropping import OUTSIDE_TRAINING, Competition, Draw, DropPolicy, by_position

if TYPE_CHECKING:
    from megatron_moe.moe.experts import ExpertSchedule
    from megatron_moe.moe.grouped_gemm import Arrival
    from megatron_moe.moe.overlap import Flight


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The capacity groups of one micro-batch.

    Args:
        group_size: tokens that compete with each other.
        groups: such groups in the micro-batch, in row order.
        slots: choices C that one expert keeps of one group.
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
        UsageError: the group size is neither a part of a row, a row, nor a number of whole rows.
    """
    size = capacity_group_tokens(moe, rows=rows, row_tokens=row_tokens)
    factor = moe.moe_expert_capacity_factor if training else moe.moe_eval_capacity_factor
    slots = slots_per_expert(moe, size, factor)
    return Capacity(group_size=size, groups=rows * row_tokens // size, slots=slots)


def slots_per_expert(moe: MoEConfig, tokens: int, factor: float | None) -> int:
    """Slots C of one expert for a group of ``tokens`` tokens.

    `t5x` (released training code): round(cf T / E), without k. `port` (PyTorch port): floor(k cf T
    / E) rounded up to even. `megatron` (`moe_utils.get_capacity`): ceil(k T / E cf), without a
    minimum. No factor: nothing drops. At most ``tokens``: choices are distinct.
    """
    if factor is None:
        return tokens
    if moe.moe_capacity_rule == "megatron":
        # In the order of Megatron-Core's operations: another one can round over an integer.
        return min(math.ceil(tokens * moe.moe_router_topk / moe.num_experts * factor), tokens)
    if moe.moe_capacity_rule == "t5x":
        slots = round(factor * tokens / moe.num_experts)
    else:
        slots = math.floor(moe.moe_router_topk * factor * tokens / moe.num_experts)
        slots += slots % 2
    return min(max(slots, moe.moe_min_capacity), tokens)


@dataclass(frozen=True, kw_only=True)
class SlotRule:
    """Who keeps a slot, and which slots are this rank's.

    Args:
        num_experts: E, over all ranks.
        policy: ranks choices.
        shares: ranks that hold the same tokens and divide the slots of each expert among them.
        share: which of these this rank is; it takes slots ``share``, ``share + shares``, ...
    """

    num_experts: int
    policy: DropPolicy = by_position
    shares: int = 1
    share: int = 0


@dataclass(frozen=True)
class Slots:
    """The slot of every choice, each group in priority order.

    Args:
        experts_GA: int64 chosen expert.
        slot_GA: int64 place among this rank's slots of that expert and group, if it owns the slot.
        owned_GA: bool, whether it does.
        kept_GA: bool, whether the choice has a slot on any rank: is not dropped.
        load_GE: int64 choices before drops, over all ranks that share the tokens.
        full_GE: int64 those of them that have a slot on any rank.
        filled_GE: int64 slots filled on this rank.
        most: slots that can be filled on this rank for one group and expert.
        block_rows: rows of a bounded buffer for each expert-parallel rank; `None` without a bound.
    """

    experts_GA: Tensor
    slot_GA: Tensor
    owned_GA: Tensor
    kept_GA: Tensor
    load_GE: Tensor
    full_GE: Tensor
    filled_GE: Tensor
    most: int
    block_rows: int | None = None


def assign_slots(
    choices_TK: Tensor,
    weights_TK: Tensor,
    batch: int,
    capacity: Capacity,
    rule: SlotRule,
    rank_in_expert: RankInExpert,
    draw: Draw = OUTSIDE_TRAINING,
    padding_T: Tensor | None = None,
) -> Slots:
    """Rank choices within their group and expert, and keep the first C.

    Args:
        choices_TK: int64 expert ids of all tokens of the micro-batch.
        weights_TK: their probabilities.
        batch: sequences B; token t is position t // B of sequence t % B.
        capacity: groups and slots.
        rule: drop policy and this rank's share.
        rank_in_expert: the kernel.
        draw: what a drop policy may depend on besides the choices.
        padding_T: bool, which tokens compete for nothing; `None` for none.
    """
    asked = choices_TK, weights_TK, batch, capacity, rule, rank_in_expert, draw, padding_T
    queued_GA, order_GA = choices_in_order(*asked)
    experts = rule.num_experts if padding_T is None else rule.num_experts + 1
    if order_GA is None:
        rank_GA, load_GE = rank_in_expert.forward(queued_GA, experts)
    else:
        sorted_GA = queued_GA.gather(1, order_GA)
        rank_GA, load_GE = rank_in_expert.forward(sorted_GA, experts)
        rank_GA = torch.empty_like(rank_GA).scatter_(1, order_GA, rank_GA)
    kept_GA = rank_GA < capacity.slots
    experts_GA = queued_GA
    if padding_T is not None:
        kept_GA &= queued_GA < rule.num_experts
        load_GE = load_GE[:, : rule.num_experts].contiguous()
        experts_GA = queued_GA.clamp(max=rule.num_experts - 1)
    full_GE = load_GE.clamp(max=capacity.slots)
    most = -(-capacity.slots // rule.shares)
    if rule.shares == 1:
        return Slots(experts_GA, rank_GA, kept_GA, kept_GA, load_GE, full_GE, full_GE, most)
    # Slots are dealt out like cards, so that shares differ by one at most however few are filled:
    # of 3 filled slots and 2 shares, share 0 owns slots 0 and 2 (its places 0 and 1), share 1 owns
    # slot 1 (its place 0), and filled is (3 + 1) // 2 = 2 and (3 + 0) // 2 = 1.
    owned_GA = kept_GA & (rank_GA % rule.shares == rule.share)
    filled_GE = (full_GE + (rule.shares - 1 - rule.share)) // rule.shares
    slot_GA = rank_GA // rule.shares
    return Slots(experts_GA, slot_GA, owned_GA, kept_GA, load_GE, full_GE, filled_GE, most)


def choices_in_order(
    choices_TK: Tensor,
    weights_TK: Tensor,
    batch: int,
    capacity: Capacity,
    rule: SlotRule,
    rank_in_expert: RankInExpert,
    draw: Draw,
    padding_T: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Choices in position order, [G, A], and their order by the drop policy; `None` for the same.

    The arguments are those of `assign_slots`. Choices of padding queue for an expert past the last,
    with the id E.
    """
    experts = rule.num_experts
    if padding_T is not None:
        choices_TK = choices_TK.masked_fill(padding_T.unsqueeze(1), experts)
        experts += 1
    experts_GA = by_priority(choices_TK, batch, capacity)
    order_GA = rule.policy(
        Competition(
            experts_GA=experts_GA,
            weights_GA=lambda: by_priority(weights_TK.detach(), batch, capacity),
            topk=choices_TK.shape[1],
            num_experts=experts,
            slots=capacity.slots,
            draw=draw,
            rank_in_expert=rank_in_expert,
        )
    )
    return experts_GA, order_GA


def by_priority(value_TK: Tensor, batch: int, capacity: Capacity) -> Tensor:
    """[T, K] to [G, A]: groups row by row, in each all first choices before all second ones.

    For B = 2 rows of 2 tokens and K = 2, tokens 0 and 2 are row 0, tokens 1 and 3 row 1. With tk
    for choice k of token t: a group per row gives [00 20 01 21] and [10 30 11 31], one group of
    both rows [00 20 10 30 01 21 11 31], groups of one token [00 01], [20 21], [10 11], [30 31].
    """
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


@dataclass(frozen=True, kw_only=True)
class BufferLayout:
    """Where the rows of each expert lie in the buffer.

    Args:
        kind: `fixed`: a row for every slot, filled or not. `packed`: in each block the filled rows
            by expert, then the empty ones. `aligned`: those of each expert from a given row on.
        blocks: expert-parallel ranks; block i holds the experts of rank i.
        block_rows: rows of one block.
        expert_rows: rows of one expert in `fixed`.
        starts: first row of each expert in `aligned`.
        chunks: of the slots in `fixed`, if exchanges overlap: the buffer has one after the other.
    """

    kind: Literal["fixed", "packed", "aligned"]
    blocks: int
    block_rows: int
    expert_rows: int = 0
    starts: tuple[int, ...] = ()
    chunks: SlotChunks | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.blocks * self.block_rows

    @classmethod
    def fixed(cls, slots: Slots, blocks: int, chunks: int = 1) -> BufferLayout:
        """A row for every slot of this rank, in so many chunks of slots."""
        groups, experts = slots.filled_GE.shape
        expert_rows = groups * slots.most
        block_rows = experts // blocks * expert_rows
        return cls(
            kind="fixed",
            blocks=blocks,
            block_rows=block_rows,
            expert_rows=expert_rows,
            chunks=SlotChunks(expert_rows, min(chunks, expert_rows)) if chunks > 1 else None,
        )

    @classmethod
    def packed(cls, slots: Slots, blocks: int) -> BufferLayout:
        """As many rows per block as choices could fill, if all went to one rank, or its bound."""
        rows = slots.block_rows
        if rows is None:
            rows = min(cls.fixed(slots, blocks).block_rows, slots.experts_GA.numel())
        return cls(kind="packed", blocks=blocks, block_rows=rows)

    @classmethod
    def aligned(cls, expert_rows: list[int]) -> BufferLayout:
        """With these rows for each expert; for one expert-parallel rank."""
        ends = list(accumulate(expert_rows))
        return cls(kind="aligned", blocks=1, block_rows=ends[-1], starts=(0, *ends[:-1]))


@dataclass(frozen=True)
class Placement:
    """The buffer row of each choice, and the token of each row.

    Args:
        rows_TK: int64 row of each choice; 0 where this rank has no row for it.
        owned_TK: bool, whether the choice has a row on this rank.
        kept_TK: bool, whether it has a row on any rank that shares the tokens: not dropped.
        source_R: int64 token of each row; 0 in empty rows.
        copied_R: int64 token to copy into each row: `source_R`, but -1 in empty rows if the experts
            compute those.
    """

    rows_TK: Tensor
    owned_TK: Tensor
    kept_TK: Tensor
    source_R: Tensor
    copied_R: Tensor


def place(slots: Slots, batch: int, capacity: Capacity, layout: BufferLayout) -> Placement:
    """Give each choice that owns a slot of this rank its row."""
    row_GA = _first_rows(slots.filled_GE, layout).gather(1, slots.experts_GA) + slots.slot_GA
    if layout.chunks is not None:
        row_GA = layout.chunks.rows(row_GA, slots.filled_GE.shape[1])
    # Choices without a row here go to a spare row past the end: no branch, no host read.
    target_TK = by_token(row_GA.where(slots.owned_GA, layout.rows), batch, capacity)
    owned_TK = target_TK < layout.rows
    shared = slots.owned_GA is not slots.kept_GA
    kept_TK = by_token(slots.kept_GA, batch, capacity) if shared else owned_TK
    # The token of each row is the inverse of this map, without the spare row; -1 in empty rows.
    tokens, topk = target_TK.shape
    token_A = torch.arange(tokens, device=target_TK.device).repeat_interleave(topk)
    inverse_R = target_TK.new_full((layout.rows + 1,), -1)
    copied_R = inverse_R.scatter_(0, target_TK.reshape(-1), token_A)[: layout.rows]
    source_R = copied_R.clamp(min=0)
    if layout.kind == "packed":
        copied_R = source_R
    return Placement(target_TK * owned_TK, owned_TK, kept_TK, source_R, copied_R)


def _first_rows(filled_GE: Tensor, layout: BufferLayout) -> Tensor:
    """The buffer row of slot 0 of each group and expert, [G, E].

    An example: two groups, two experts, of at most 2 slots each, filled [[2, 1], [1, 2]].

    - `fixed`: row = expert * 4 + group * 2 + slot, so first rows are [[0, 4], [2, 6]]; rows 3 and 5
      stay empty.
    - `packed`, one block: expert 1 follows the 3 filled rows of expert 0, and group 1 follows the
      rows that group 0 filled of the same expert: [[0, 3], [0 + 2, 3 + 1]].
    - `packed`, two blocks of 4 rows: each rank's experts start with its block: [[0, 4], [2, 5]].
    - `aligned` to 4 rows each: as the last, and row 3 and 7 are padding of a batched GEMM.
    """
    (groups, experts), device = filled_GE.shape, filled_GE.device
    if layout.kind == "packed":
        filled_NE = filled_GE.sum(0).view(layout.blocks, -1)
        block_N = torch.arange(layout.blocks, device=device) * layout.block_rows
        first_E = (filled_NE.cumsum(1) - filled_NE + block_N.unsqueeze(1)).view(-1)
    elif layout.kind == "aligned":
        first_E = torch.tensor(layout.starts, device=device)
    else:
        first_E = torch.arange(experts, device=device) * layout.expert_rows
        group_G = torch.arange(groups, device=device)
        return first_E + group_G.unsqueeze(1) * (layout.expert_rows // groups)
    return first_E + filled_GE.cumsum(0) - filled_GE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that one forward pass decides before it moves a token.

    Args:
        batch: sequences B of the micro-batch.
        capacity: its groups and slots.
        choices_TK: int64 chosen experts of all tokens of the sequences, over all ranks.
        weights_TK: fp32 probabilities of these choices, differentiable.
        padding_T: bool, which of these tokens are padding that is not routed; `None` for none.
        slots: who keeps a slot.
        schedule: how the experts compute, with the layout of the buffer.
        placement: rows of this rank's buffer.
        kernels: those of the device.
        flight: exchanges that overlap with computation; `None` for those in one piece.
        arrival: rows that come sorted by expert; `None` where they come as ``schedule`` says.
    """

    batch: int
    capacity: Capacity
    choices_TK: Tensor
    weights_TK: Tensor
    padding_T: Tensor | None
    slots: Slots
    schedule: ExpertSchedule
    placement: Placement
    kernels: Kernels
    flight: Flight | None = None
    arrival: Arrival | None = None
