"""Scores: fp32 softmax over all experts, then the best, without renormalising."""

from __future__ import annotations

import pytest
import torch

from megatron_moe.moe.router import route, top_choices


def test_by_hand_the_weights_are_raw_probabilities() -> None:
    weight = torch.eye(3)
    x = torch.tensor([[2.0, 1.0, 0.0]])
    scores = route(x, weight, 2)
    z = sum(torch.tensor([2.0, 1.0, 0.0]).exp())
    assert scores.choices_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(
        scores.weights_TK, torch.stack([torch.tensor(2.0).exp(), torch.tensor(1.0).exp()])[None] / z
    )
    assert scores.weights_TK.sum() < 1


def test_low_precision_tokens_are_scored_in_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    scores = route(x, weight, 2)
    assert scores.logits_TE.dtype == scores.probs_TE.dtype == torch.float32
    assert torch.equal(scores.logits_TE, x.float() @ weight.float().t())


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
def test_among_equals_the_lower_expert_comes_first(topk: int) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.2, 0.1, 0.2, 0.2], [1 / 6] * 6])
    expected = [[1, 2, 4, 5, 0, 3], [0, 1, 2, 3, 4, 5]]
    assert top_choices(probs, topk).tolist() == [row[:topk] for row in expected]


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_best_experts_in_order(topk: int) -> None:
    torch.manual_seed(1)
    probs = torch.randn(50, 9).softmax(-1)
    assert torch.equal(top_choices(probs, topk), probs.topk(topk).indices)


def test_the_gradient_reaches_router_and_tokens_through_the_softmax() -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: route(a, b, 2).weights_TK, (x, weight))
