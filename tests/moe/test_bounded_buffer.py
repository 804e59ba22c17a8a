"""Buffers of bounded size: who overflows, worked by hand; layouts where nothing does."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference import rank_in_expert
from megatron_moe.moe import collect_statistics
from megatron_moe.moe.bounded_buffer import BufferBound, assign_bounded, buffer_bound
from megatron_moe.moe.dropping import DROP_POLICIES
from megatron_moe.moe.plan import BufferLayout, Capacity, SlotRule, place
from tests.moe import ranks
from tests.moe.cases import layer_of, moe_config, tokens
from tests.support.pool import Pool

GROUPED = {"moe_expert_impl": "grouped", "moe_expert_capacity_factor": None}


def placed(
    choices: list[list[int]],
    bound: BufferBound,
    batch: int = 1,
    weights: list[list[float]] | None = None,
    padding: list[bool] | None = None,
    **rule: object,
) -> tuple[list[list[bool]], list[int], list[list[int]]]:
    """Kept choices, the token of each row (-1: none), and the rows filled for each expert."""
    ids = torch.tensor(choices)
    values = torch.ones(ids.shape) if weights is None else torch.tensor(weights)
    size = len(choices) // batch
    capacity = Capacity(group_size=size, groups=batch, slots=size)
    asked = ids, values, batch, capacity, SlotRule(num_experts=4, **rule), bound, rank_in_expert
    pads = torch.tensor(padding or [False] * len(choices))
    slots = assign_bounded(*asked, padding_T=None if padding is None else pads)
    found = place(slots, batch, capacity, BufferLayout.packed(slots, bound.ranks))
    rows = [-1] * (bound.ranks * bound.rows)
    for token, (own, at) in enumerate(
        zip(found.owned_TK.tolist(), found.rows_TK.tolist(), strict=True)
    ):
        for owned, row in zip(own, at, strict=True):
            if owned:
                assert rows[row] == -1, "two choices in one row"
                rows[row] = token
    assert slots.load_GE.sum() == ids[~pads].numel()
    assert slots.full_GE.sum() == found.kept_TK.sum()
    return found.kept_TK.tolist(), rows, slots.filled_GE.tolist()


def test_choices_past_the_bound_overflow_in_order() -> None:
    """Experts 0 and 1 are on rank 0, 2 and 3 on rank 1; two rows for each rank.

    First choices for rank 0 are those of tokens 0, 1 and 2: token 2 overflows, though its expert
    has one row less than no capacity allows. Second choices for rank 0: token 3's, too late. For
    rank 1: first token 3, then the second choices of tokens 0, 1 and 2, of which the first fits; it
    is of the same expert, and so in the row after.
    """
    choices = [[0, 2], [1, 2], [0, 3], [2, 1]]
    kept, rows, filled = placed(choices, BufferBound(ranks=2, rows=2))
    assert kept == [[True, True], [True, False], [False, False], [True, False]]
    assert rows == [0, 1, 3, 0]
    assert filled == [[1, 1, 2, 0]]


def test_padding_takes_no_rows() -> None:
    """The case above with token 0 padding: tokens 1 and 2 fit on rank 0, two more on rank 1."""
    choices, bound = [[0, 2], [1, 2], [0, 3], [2, 1]], BufferBound(ranks=2, rows=2)
    kept, rows, filled = placed(choices, bound, padding=[True, False, False, False])
    assert kept == [[False, False], [True, True], [True, False], [True, False]]
    assert rows == [2, 1, 3, 1]
    assert filled == [[1, 1, 2, 0]]


def test_the_most_probable_stay_under_policy_probs() -> None:
    choices, weights = [[0], [1], [0], [2]], [[0.2], [0.9], [0.5], [0.1]]
    bound, probs = BufferBound(ranks=2, rows=2), DROP_POLICIES["probs"]
    kept, rows, _ = placed(choices, bound, weights=weights, policy=probs)
    assert kept == [[False], [True], [True], [True]]
    assert rows == [2, 1, 3, -1]


def test_rows_of_a_micro_batch_take_turns() -> None:
    """Tokens 0 and 2 are row 0, tokens 1 and 3 row 1: of three rows the third is row 0's second."""
    kept, _, filled = placed([[0], [0], [1], [1]], BufferBound(ranks=1, rows=3), batch=2)
    assert kept == [[True], [True], [True], [False]]
    assert filled == [[1, 1, 0, 0], [1, 0, 0, 0]]


def test_ranks_that_share_tokens_divide_the_rows_evenly() -> None:
    """Five choices for rank 0 in turns: share 0 has those of tokens 0, 2 and 4."""
    choices = [[0], [1], [0], [0], [1]]
    bound = BufferBound(ranks=2, rows=3)
    for share, tokens_there in ((0, [0, 2, 4]), (1, [3, 1, -1])):
        kept, rows, _ = placed(choices, bound, shares=2, share=share)
        assert kept == [[True]] * 5
        assert rows[:3] == tokens_there


@pytest.mark.parametrize(
    ("factor", "rows"), [(None, None), (1.0, 12), (1.25, 15), (1.26, 16), (100.0, 24)]
)
def test_rows_for_a_rank(factor: float | None, rows: int | None) -> None:
    """48 choices, of which 2 ranks share the tokens: an even load of 12 for each of 2 ranks."""
    moe = moe_config(**GROUPED, moe_dropless_buffer_factor=factor)
    bound = buffer_bound(moe, choices=48, ranks=2, shares=2, training=True)
    assert (bound and bound.rows) == rows
    assert buffer_bound(moe, choices=48, ranks=2, shares=2, training=False) is None


def test_a_bound_that_is_never_reached_changes_nothing() -> None:
    """Bit for bit; one rank has room for everything at a factor of 1."""
    results = []
    for factor in (None, 1.0, 3.0):
        layer = layer_of(moe_config(**GROUPED, moe_dropless_buffer_factor=factor))
        x = tokens(1).requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, (x, *layer.parameters()), tokens(2))
        results.append((y, *grads))
        assert collect_statistics([layer], None)[3].dropped_choices == 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_counter_and_the_plan_agree_on_what_overflows() -> None:
    """Two expert-parallel ranks, of which this process plans the first: nothing is sent."""
    moe = moe_config(**GROUPED, moe_dropless_buffer_factor=1.0)
    layer = layer_of(moe)
    scores, _ = layer.router(tokens(1).flatten(0, 1))
    bound = buffer_bound(moe, choices=scores.choices_TK.numel(), ranks=2, shares=1, training=True)
    assert bound is not None
    capacity = Capacity(group_size=12, groups=2, slots=12)
    rule = SlotRule(num_experts=4)
    slots = assign_bounded(
        scores.choices_TK, scores.weights_TK, 2, capacity, rule, bound, rank_in_expert
    )
    load = slots.load_GE.sum(0).view(2, 2).sum(1)
    assert slots.full_GE.sum(0).view(2, 2).sum(1).tolist() == load.clamp(max=24).tolist()
    assert load.max() > 24


LAYOUTS = {
    "EP2": (2, 1, 2, 1),
    "TP2 over EP2": (2, 2, 2, 1),
    "TP2 x EP2": (4, 2, 2, 2),
    "EP2 x ETP2": (4, 1, 2, 2),
    "EP4": (4, 1, 4, 1),
    "TP4, ETP2": (4, 4, 1, 2),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "TP2 x EP2" else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_without_overflow_every_layout_equals_one_process(pool: Pool, name: str) -> None:
    """Each rank has room for all choices: as many times the even load as there are ranks."""
    world_size, tp, ep, etp = LAYOUTS[name]
    settings = {**GROUPED, "moe_dropless_buffer_factor": float(ep)}
    found = pool.run(ranks.check_layout, world_size, tp=tp, ep=ep, etp=etp, settings=settings)
    assert found == [0] * world_size


def test_overflow_on_expert_parallel_ranks(pool: Pool) -> None:
    settings = {**GROUPED, "moe_dropless_buffer_factor": 1.0}
    settings |= {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}
    assert sum(pool.run(ranks.check_overflow, 2, settings=settings)) > 0
