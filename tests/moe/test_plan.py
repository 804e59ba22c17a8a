"""Who keeps a slot and which row it gets: cases worked by hand, then properties."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import rank_in_expert
from megatron_moe.moe import plan as plan_module
from megatron_moe.moe.dropping import DROP_POLICIES, OUTSIDE_TRAINING, Draw
from megatron_moe.moe.plan import (
    BufferLayout,
    Capacity,
    Placement,
    SlotRule,
    Slots,
    assign_slots,
    by_priority,
    by_token,
    place,
)


@dataclass
class Planned:
    """A plan and the slots it was made from."""

    plan: Placement
    slots: Slots
    layout: BufferLayout

    @property
    def filled_E(self) -> list[int]:
        return self.slots.filled_GE.sum(0).tolist()


def plan_of(
    choices: list[list[int]] | Tensor,
    batch: int,
    capacity: Capacity,
    rule: SlotRule,
    weights: list[list[float]] | Tensor | None = None,
    kind: str = "fixed",
    blocks: int = 1,
    draw: Draw = OUTSIDE_TRAINING,
    padding: Tensor | None = None,
) -> Planned:
    ids = torch.as_tensor(choices)
    values = torch.ones(ids.shape) if weights is None else torch.as_tensor(weights)
    slots = assign_slots(ids, values, batch, capacity, rule, rank_in_expert, draw, padding)
    if kind == "packed":
        layout = BufferLayout.packed(slots, blocks)
    elif kind == "aligned":
        filled = slots.filled_GE.sum(0).tolist()
        # As for GEMMs over two experts each.
        layout = BufferLayout.aligned([max(filled[e // 2 * 2 :][:2]) for e in range(len(filled))])
    else:
        layout = BufferLayout.fixed(slots, blocks)
    return Planned(place(slots, batch, capacity, layout), slots, layout)


ONE_ROW = [[0, 1], [0, 1], [0, 1], [1, 0]]
"""Four tokens. First choices: expert 0 gets tokens 0, 1, 2; expert 1 gets token 3.
Second choices after all of these: expert 1 gets tokens 0, 1, 2 as its ranks 1, 2, 3; expert 0 gets
token 3 as its rank 3."""


def test_all_first_choices_come_before_all_second_choices() -> None:
    capacity = Capacity(group_size=4, groups=1, slots=2)
    planned = plan_of(ONE_ROW, 1, capacity, SlotRule(num_experts=2))
    plan = planned.plan
    # Token 2 is dropped twice. Token 3 keeps its first choice and loses its second: each choice is
    # judged alone. Expert 1 keeps token 3 (first choice) and token 0 (second).
    assert plan.kept_TK.tolist() == [[True, True], [True, False], [False, False], [True, False]]
    assert plan.rows_TK.tolist() == [[0, 3], [1, 0], [0, 0], [2, 0]]
    assert plan.source_R.tolist() == [0, 1, 3, 0]
    assert planned.filled_E == [2, 2]


def test_a_second_choice_is_ranked_after_first_choices_that_were_dropped() -> None:
    """One slot more than expert 0 has undropped first choices would not be enough for token 3."""
    capacity = Capacity(group_size=4, groups=1, slots=3)
    planned = plan_of(ONE_ROW, 1, capacity, SlotRule(num_experts=2))
    plan = planned.plan
    assert plan.kept_TK.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    # Rank 3 of expert 0 is token 3's: with four slots it stands behind all three first choices.
    wide = plan_of(ONE_ROW, 1, replace(capacity, slots=4), SlotRule(num_experts=2)).plan
    assert wide.rows_TK.tolist() == [[0, 5], [1, 6], [2, 7], [4, 3]]


def test_tokens_of_a_row_compete_in_the_order_of_the_row() -> None:
    """Activations are [S, B, H]: tokens 0, 2, 4 are row 0 and tokens 1, 3, 5 row 1."""
    choices = [[0], [1], [0], [0], [0], [0]]
    capacity = Capacity(group_size=3, groups=2, slots=2)
    plan = plan_of(choices, 2, capacity, SlotRule(num_experts=2)).plan
    # Row 0 sends three tokens to expert 0: the last is dropped. Row 1 sends two.
    assert plan.kept_TK.flatten().tolist() == [True, True, True, True, False, True]
    # Fixed rows are (expert, group, slot): expert 0 has rows 0, 1 | 2, 3, expert 1 has 4, 5 | 6, 7.
    assert plan.rows_TK.flatten().tolist() == [0, 6, 1, 2, 0, 3]


def test_a_group_over_both_rows_takes_row_0_first() -> None:
    choices = [[0], [0], [0], [0]]  # row 0: tokens 0, 2; row 1: tokens 1, 3
    capacity = Capacity(group_size=4, groups=1, slots=3)
    plan = plan_of(choices, 2, capacity, SlotRule(num_experts=1)).plan
    assert plan.rows_TK.flatten().tolist() == [0, 2, 1, 0]
    assert plan.kept_TK.flatten().tolist() == [True, True, True, False]


def test_groups_smaller_than_a_row() -> None:
    capacity = Capacity(group_size=2, groups=2, slots=1)
    plan = plan_of([[0], [0], [0], [0]], 1, capacity, SlotRule(num_experts=1)).plan
    assert plan.kept_TK.flatten().tolist() == [True, False, True, False]


def test_policy_probs_keeps_the_most_probable_and_breaks_ties_by_position() -> None:
    weights = [[0.5, 0.3], [0.9, 0.05], [0.6, 0.3], [0.8, 0.7]]
    layout = SlotRule(num_experts=2, policy=DROP_POLICIES["probs"])
    plan = plan_of(ONE_ROW, 1, Capacity(group_size=4, groups=1, slots=2), layout, weights).plan
    # Expert 0: token 1 (.9), token 3's second choice (.7); out: token 2 (.6), token 0 (.5).
    # Expert 1: token 3 (.8), then tokens 0 and 2 tie at .3: token 0 is earlier.
    assert plan.kept_TK.tolist() == [[False, True], [True, False], [False, False], [True, True]]
    assert plan.rows_TK.tolist() == [[0, 3], [0, 0], [0, 0], [2, 1]]


def test_packed_rows_are_the_filled_ones_sorted_by_expert() -> None:
    choices = [[0], [1], [2], [0], [2], [2]]  # rows 0: 0, 2, 2 and 1: 1, 0, 2
    capacity = Capacity(group_size=3, groups=2, slots=1)
    layout = SlotRule(num_experts=4)
    planned = plan_of(choices, 2, capacity, layout, kind="packed")
    plan = planned.plan
    # Kept: expert 0 of both groups, expert 1 of row 1, expert 2 of both; token 4 is dropped.
    assert planned.filled_E == [2, 1, 2, 0]
    assert plan.rows_TK.flatten().tolist() == [0, 2, 3, 1, 0, 4]
    assert plan.source_R.tolist() == [0, 3, 1, 2, 5, 0]


def test_packed_blocks_start_at_fixed_rows() -> None:
    choices = [[3], [0], [3], [2]]
    capacity = Capacity(group_size=4, groups=1, slots=2)
    planned = plan_of(choices, 1, capacity, SlotRule(num_experts=4), kind="packed", blocks=2)
    assert planned.layout.block_rows == 4
    assert planned.plan.rows_TK.flatten().tolist() == [5, 0, 6, 4]


def test_ranks_that_share_tokens_divide_the_slots() -> None:
    capacity = Capacity(group_size=4, groups=1, slots=3)
    layouts = [SlotRule(num_experts=1, shares=2, share=i) for i in range(2)]
    first, second = (plan_of([[0]] * 4, 1, capacity, layout) for layout in layouts)
    even, odd = first.plan, second.plan
    assert even.owned_TK.flatten().tolist() == [True, False, True, False]
    assert odd.owned_TK.flatten().tolist() == [False, True, False, False]
    assert first.filled_E == [2]
    assert second.filled_E == [1]
    assert even.kept_TK.equal(odd.kept_TK)


def test_aligned_rows_are_filled_rows_with_the_room_given_to_each_expert() -> None:
    choices = [[0], [1], [2], [0], [2], [2]]  # rows 0: 0, 2, 2 and 1: 1, 0, 2
    capacity = Capacity(group_size=3, groups=2, slots=2)
    planned = plan_of(choices, 2, capacity, SlotRule(num_experts=4), kind="aligned")
    assert planned.filled_E == [2, 1, 3, 0]
    assert planned.layout.starts == (0, 2, 4, 7)
    assert planned.layout.rows == 10
    # Expert 2 starts at row 4: tokens 2 and 4 of row 0, then token 5 of row 1.
    assert planned.plan.rows_TK.flatten().tolist() == [0, 2, 4, 1, 5, 6]


@pytest.mark.parametrize("policy", ["position", "probs", "random", "fair"])
@pytest.mark.parametrize(
    ("kind", "experts", "blocks", "shares"),
    [
        *itertools.product(["fixed", "packed", "aligned"], [6, 40], [1], [1, 3]),
        *itertools.product(["fixed", "packed"], [6, 40], [2], [1, 2]),
    ],
)
@pytest.mark.parametrize("slots", [1, 3, 30])
def test_every_kept_choice_has_one_row_of_its_own(
    policy: str, kind: str, experts: int, blocks: int, shares: int, slots: int
) -> None:
    torch.manual_seed(experts * slots)
    batch, tokens, topk = 3, 90, 3
    capacity = Capacity(group_size=30, groups=3, slots=slots)
    weights, choices = torch.rand(tokens, experts).topk(topk)
    rule = SlotRule(num_experts=experts, policy=DROP_POLICIES[policy], shares=shares)
    results = [
        plan_of(choices, batch, capacity, replace(rule, share=i), weights, kind, blocks)
        for i in range(shares)
    ]
    owners = torch.stack([r.plan.owned_TK for r in results]).int().sum(0)
    assert torch.equal(owners, results[0].plan.kept_TK.int())
    for result in results:
        plan, block_rows = result.plan, result.layout.block_rows
        rows = plan.rows_TK[plan.owned_TK]
        assert rows.unique().numel() == rows.numel()
        token = torch.arange(tokens)[:, None].expand(tokens, topk)[plan.owned_TK]
        assert torch.equal(plan.source_R[rows], token)
        expected = plan.source_R.clone()
        if kind != "packed":  # empty rows are computed as well
            empty = torch.ones(len(expected), dtype=torch.bool).index_fill_(0, rows, False)
            expected[empty] = -1
        assert torch.equal(plan.copied_R, expected)
        owned_experts = choices[plan.owned_TK]
        assert result.filled_E == torch.bincount(owned_experts, minlength=experts).tolist()
        assert plan.source_R.numel() == blocks * block_rows
        assert torch.equal(rows // block_rows, owned_experts // (experts // blocks))
        if kind == "packed":
            by_row = owned_experts[rows.argsort()]
            assert torch.equal(by_row, by_row.sort().values)
        elif kind == "aligned":
            starts = torch.tensor(result.layout.starts)
            assert torch.equal(torch.searchsorted(starts, rows, right=True) - 1, owned_experts)
        else:
            assert torch.equal(rows // result.layout.expert_rows, owned_experts)


@pytest.mark.parametrize("policy", ["position", "probs", "random", "fair"])
def test_slots_are_full_before_anything_drops(policy: str) -> None:
    torch.manual_seed(3)
    weights, choices = torch.rand(64, 8).topk(2)
    capacity = Capacity(group_size=16, groups=4, slots=3)
    rule = SlotRule(num_experts=8, policy=DROP_POLICIES[policy])
    kept_TK = plan_of(choices, 4, capacity, rule, weights).plan.kept_TK
    for row, expert in itertools.product(range(4), range(8)):
        mine = choices[row::4] == expert
        assert (kept_TK[row::4] & mine).sum() == min(int(mine.sum()), 3)


def test_priority_order_by_hand() -> None:
    """The example of `by_priority`: two rows of two tokens, two choices; tk is 10 t + k."""
    value = torch.tensor([[0, 1], [10, 11], [20, 21], [30, 31]])
    cases = {
        2: [[0, 20, 1, 21], [10, 30, 11, 31]],
        1: [[0, 20, 10, 30, 1, 21, 11, 31]],
        4: [[0, 1], [20, 21], [10, 11], [30, 31]],
    }
    for groups, expected in cases.items():
        capacity = Capacity(group_size=4 // groups, groups=groups, slots=1)
        order = by_priority(value, 2, capacity)
        assert order.tolist() == expected
        assert torch.equal(by_token(order, 2, capacity), value)


def test_first_rows_by_hand() -> None:
    """The example of `_first_rows`: fills of [[2, 1], [1, 2]]."""
    filled = torch.tensor([[2, 1], [1, 2]])
    layouts = {
        (0, 4, 2, 6): BufferLayout(kind="fixed", blocks=1, block_rows=8, expert_rows=4),
        (0, 3, 2, 4): BufferLayout(kind="packed", blocks=1, block_rows=6),
        (0, 4, 2, 5): BufferLayout(kind="packed", blocks=2, block_rows=4),
    }
    for expected, layout in layouts.items():
        assert tuple(plan_module._first_rows(filled, layout).flatten().tolist()) == expected
    aligned = BufferLayout.aligned([4, 4])
    assert plan_module._first_rows(filled, aligned).tolist() == [[0, 4], [2, 5]]


def test_padding_takes_no_slots_by_hand() -> None:
    """Of `ONE_ROW` token 0 is padding: expert 0 has tokens 1, 2, and 3 as a second choice."""
    capacity, padding = (
        Capacity(group_size=4, groups=1, slots=2),
        torch.tensor([True] + [False] * 3),
    )
    planned = plan_of(ONE_ROW, 1, capacity, SlotRule(num_experts=2), padding=padding)
    # Expert 1 has token 3, then the second choices of tokens 1 and 2.
    kept_TK = [[False, False], [True, True], [True, False], [True, False]]
    assert planned.plan.kept_TK.tolist() == kept_TK
    assert planned.plan.rows_TK.tolist() == [[0, 0], [0, 3], [1, 0], [2, 0]]
    assert planned.plan.source_R.tolist() == [1, 2, 3, 1]
    assert planned.slots.load_GE.tolist() == [[3, 3]]
    assert planned.filled_E == [2, 2]


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("policy", ["position", "probs", "random", "fair"])
def test_real_tokens_keep_what_they_keep_without_padding(policy: str, shares: int) -> None:
    """And no expert has more than its slots. `random` draws for places, so there only the sums."""
    generator = torch.Generator().manual_seed(7)
    for trial in range(20):
        weights, choices = torch.rand(48, 6, generator=generator).topk(2)
        padding = torch.rand(48, generator=generator) < trial / 19
        slots, draw = 1 + trial % 7, Draw(layer=trial, seed=1, step=trial)
        rule = SlotRule(num_experts=6, policy=DROP_POLICIES[policy], shares=shares)
        capacity = Capacity(group_size=48, groups=1, slots=slots)
        found = plan_of(choices, 1, capacity, rule, weights, draw=draw, padding=padding)
        assert not found.plan.kept_TK[padding].any()
        kept_E = choices[found.plan.kept_TK].bincount(minlength=6)
        load_E = choices[~padding].flatten().bincount(minlength=6)
        assert torch.equal(kept_E, load_E.clamp(max=slots))
        assert torch.equal(found.slots.load_GE[0], load_E)
        real = int((~padding).sum())
        if policy == "random" or real == 0:
            continue
        alone = Capacity(group_size=real, groups=1, slots=slots)
        expected = plan_of(choices[~padding], 1, alone, rule, weights[~padding], draw=draw)
        assert torch.equal(found.plan.kept_TK[~padding], expected.plan.kept_TK)
