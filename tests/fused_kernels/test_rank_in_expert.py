"""Both ways of ranking against counting by hand."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference import rank_in_expert

WAYS = (rank_in_expert.by_one_hot, rank_in_expert.by_sort, rank_in_expert.forward)


@pytest.mark.parametrize("way", WAYS)
def test_a_case_worked_by_hand(way) -> None:
    experts = torch.tensor([[2, 0, 2, 2, 0], [1, 1, 1, 1, 1]])
    rank, load = way(experts, 4)
    assert rank.tolist() == [[0, 0, 1, 2, 1], [0, 1, 2, 3, 4]]
    assert load.tolist() == [[2, 0, 3, 0], [0, 5, 0, 0]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("groups", "choices", "experts"), [(1, 1, 1), (3, 97, 7), (2, 64, 100)])
def test_counting_one_by_one(way, groups: int, choices: int, experts: int) -> None:
    torch.manual_seed(choices)
    chosen = torch.randint(0, experts, (groups, choices))
    rank, load = way(chosen, experts)
    for group, row in enumerate(chosen.tolist()):
        seen = [0] * experts
        for place, expert in enumerate(row):
            assert rank[group, place] == seen[expert]
            seen[expert] += 1
        assert load[group].tolist() == seen
