"""The drop policy `random`: by hand, against a simulated queue, over many steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_moe.moe.drop_policies import random as policy
from megatron_moe.moe.dropping import DROP_POLICIES, Draw
from megatron_moe.moe.plan import Capacity, SlotRule
from tests.moe.test_plan import plan_of


def kept(choices: Tensor, capacity: Capacity, draw: Draw, experts: int, batch: int = 1) -> Tensor:
    rule = SlotRule(num_experts=experts, policy=DROP_POLICIES["random"])
    return plan_of(choices, batch, capacity, rule, draw=draw).plan.kept_TK


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the policy's docstring, with two slots.

    Expert 0 is the first choice of tokens 0, 1, 2 and the second of token 3; its queue is first
    choices of 2, 0, 1 and then the second choice of 3: tokens 2 and 0 stay. Expert 1 is the first
    choice of token 3, then the second choice of 1, 2, 0 in that order: tokens 3 and 1 stay.
    """
    numbers = [10, 40, 5, 30, 9, 1, 7, 3]  # orders 2 0 3 1 and 1 3 2 0
    monkeypatch.setattr(policy, "uniform_bits", lambda *_: torch.tensor(numbers))
    choices = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    kept_TK = kept(choices, Capacity(group_size=4, groups=1, slots=2), Draw(), 2)
    assert kept_TK.tolist() == [[True, False], [False, True], [True, False], [True, False]]


def test_an_order_is_that_of_its_seed_step_and_layer() -> None:
    choices = torch.zeros(64, 1, dtype=torch.int64)
    capacity = Capacity(group_size=64, groups=1, slots=20)
    draws = [Draw(seed=s, step=n, layer=i) for s in (0, 1) for n in (0, 1, 2) for i in (0, 5)]
    found = {tuple(kept(choices, capacity, draw, 1).flatten().tolist()) for draw in draws}
    assert len(found) == len(draws)
    again = kept(choices, capacity, draws[3], 1)
    assert torch.equal(again, kept(choices, capacity, draws[3], 1))


def test_a_row_drops_the_same_whatever_rows_are_beside_it() -> None:
    torch.manual_seed(0)
    choices = torch.rand(3, 16, 8).topk(2).indices
    draw = Draw(seed=3, step=9)
    together = choices.transpose(0, 1).reshape(-1, 2)
    whole = kept(together, Capacity(group_size=16, groups=3, slots=2), draw, 8, batch=3)
    for row in range(3):
        alone = kept(choices[row], Capacity(group_size=16, groups=1, slots=2), draw, 8)
        assert torch.equal(whole[row::3], alone)


def test_first_choices_come_before_second_ones() -> None:
    """Four first choices fill the slots of expert 0, so that no second choice gets one."""
    choices = torch.tensor([[0, 1]] * 4 + [[1, 0]] * 4)
    capacity = Capacity(group_size=8, groups=1, slots=4)
    for step in range(50):
        kept_TK = kept(choices, capacity, Draw(step=step), 2)
        assert kept_TK.tolist() == [[True, False]] * 8


def test_no_position_is_favoured() -> None:
    """32 choices of one expert with 12 slots, 2000 steps: each is kept in 3/8 of them."""
    choices = torch.zeros(32, 1, dtype=torch.int64)
    capacity, steps = Capacity(group_size=32, groups=1, slots=12), 2000
    counts = torch.zeros(32)
    for step in range(steps):
        kept_T = kept(choices, capacity, Draw(seed=1, step=step), 1).flatten()
        assert kept_T.sum() == 12
        counts += kept_T
    share = 12 / 32
    # Of the 31 free directions each has the variance p (1 - p) 32 / 31: chi-squared, whose 1e-6
    # quantiles are 6.9 and 83.
    variance = steps * share * (1 - share) * 32 / 31
    chi = ((counts - steps * share).square() / variance).sum()
    assert 6.9 < chi < 83
