"""All ways of ranking against counting by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_kernels import select
from fused_kernels.reference import rank_in_expert
from tests.support.kernels import IMPLEMENTATIONS, need

Way = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@pytest.fixture(params=[*IMPLEMENTATIONS, "by_one_hot", "by_sort"])
def way(request: pytest.FixtureRequest) -> Way:
    """Each implementation's own choice, and both ways of the reference."""
    if request.param.startswith("by_"):
        return getattr(rank_in_expert, request.param)
    need(request.param)
    return select("rank_in_expert", request.param).module.forward


def test_a_case_worked_by_hand(way: Way) -> None:
    # As `assign_slots` may have them: not contiguous.
    experts = torch.tensor([[2, 1], [0, 1], [2, 1], [2, 1], [0, 1]]).t()
    rank, load = way(experts, 4)
    assert rank.tolist() == [[0, 0, 1, 2, 1], [0, 1, 2, 3, 4]]
    assert load.tolist() == [[2, 0, 3, 0], [0, 5, 0, 0]]


@pytest.mark.parametrize(("groups", "choices", "experts"), [(1, 1, 1), (3, 97, 7), (2, 64, 100)])
def test_counting_one_by_one(way: Way, groups: int, choices: int, experts: int) -> None:
    torch.manual_seed(choices)
    chosen = torch.randint(0, experts, (groups, choices))
    rank, load = way(chosen, experts)
    for group, row in enumerate(chosen.tolist()):
        seen = [0] * experts
        for place, expert in enumerate(row):
            assert rank[group, place] == seen[expert]
            seen[expert] += 1
        assert load[group].tolist() == seen


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_expert_that_there_is_not_is_rejected(way: Way, bad: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        way(torch.tensor([[0, 3, bad]]), 4)
