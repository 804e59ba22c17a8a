"""Ranks in Triton: those of the reference, exactly, over any number of tiles."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference import rank_in_expert as reference
from fused_kernels.triton import rank_in_expert

SIZES = [
    (1, 1, 1),
    (3, 97, 7),
    (2, 128, 3),
    (1, 300, 512),
    (4, 257, 33),
    (0, 5, 4),
    (2, 0, 4),
]
"""Groups, choices of each, experts."""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ranks_and_loads(device: torch.device, sizes: tuple[int, int, int]) -> None:
    groups, choices, experts = sizes
    torch.manual_seed(choices)
    # As a drop policy may have them: not contiguous. Many experts have no token at all.
    chosen_GA = torch.randint(0, experts, (choices, groups)).t().to(device)
    found = rank_in_expert.forward(chosen_GA, experts)
    if chosen_GA.numel():
        for mine, theirs in zip(found, reference.by_sort(chosen_GA, experts), strict=True):
            assert mine.dtype == torch.int64
            assert torch.equal(mine, theirs)
    else:
        assert found[0].shape == (groups, choices)
        assert found[1].tolist() == [[0] * experts] * groups


def test_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than a program of the running sum holds at once."""
    monkeypatch.setattr(rank_in_expert, "TILE", 16)
    monkeypatch.setattr(rank_in_expert, "TILES", 4)
    chosen_GA = torch.randint(0, 40, (2, 211), generator=torch.Generator().manual_seed(0))
    chosen_GA = chosen_GA.to(device)
    found = rank_in_expert.forward(chosen_GA, 40)
    assert all(map(torch.equal, found, reference.by_sort(chosen_GA, 40)))


def test_all_choose_the_same(device: torch.device) -> None:
    chosen_GA = torch.full((1, 260), 2, device=device)
    rank_GA, load_GE = rank_in_expert.forward(chosen_GA, 4)
    assert rank_GA.tolist() == [list(range(260))]
    assert load_GE.tolist() == [[0, 0, 260, 0]]


def test_an_id_that_is_no_expert_touches_no_other_memory(device: torch.device) -> None:
    chosen_GA = torch.tensor([[0, 7, -1, 0]], device=device)
    rank_GA, load_GE = rank_in_expert.forward(chosen_GA, 3)
    assert rank_GA[0, [0, 3]].tolist() == [0, 1]
    assert load_GE.tolist() == [[2, 0, 0]]
