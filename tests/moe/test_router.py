"""Scores: fp32 softmax over all experts, then the best, without renormalizing."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference.router import best_choices
from megatron_moe.moe.router import route


def test_by_hand_the_weights_are_raw_probabilities() -> None:
    weight = torch.eye(3)
    x = torch.tensor([[2.0, 1.0, 0.0]])
    scores, _ = route(x, weight, 2)
    z = sum(torch.tensor([2.0, 1.0, 0.0]).exp())
    assert scores.choices_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(
        scores.weights_TK, torch.stack([torch.tensor(2.0).exp(), torch.tensor(1.0).exp()])[None] / z
    )
    assert scores.weights_TK.sum() < 1


def test_low_precision_tokens_are_scored_in_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()
    scores, _ = route(x, weight, 2)
    assert scores.logits_TE.dtype == scores.probs_TE.dtype == torch.float32
    torch.testing.assert_close(
        scores.logits_TE, x.float() @ weight.float().t(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
def test_among_equals_the_lower_expert_comes_first(topk: int) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.2, 0.1, 0.2, 0.2], [1 / 6] * 6])
    expected = [[1, 2, 4, 5, 0, 3], [0, 1, 2, 3, 4, 5]]
    ids, values = best_choices(probs.t(), topk)
    assert ids.t().tolist() == [row[:topk] for row in expected]
    assert torch.equal(values.t(), probs.gather(1, ids.t()))


@pytest.mark.parametrize("topk", [2, 3])
def test_no_expert_is_chosen_twice_where_all_other_probabilities_are_zero(topk: int) -> None:
    """A probability in fp32 is 0 where the logit is 104 below the largest."""
    ids, values = best_choices(torch.tensor([[1.0], [0.0], [0.0]]), topk)
    assert ids.flatten().tolist() == [0, 1, 2][:topk]
    assert values.flatten().tolist() == [1.0, 0.0, 0.0][:topk]


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_best_experts_in_order(topk: int) -> None:
    torch.manual_seed(1)
    probs = torch.randn(50, 9).softmax(-1)
    ids, values = best_choices(probs.t(), topk)
    assert torch.equal(ids.t(), probs.topk(topk).indices)
    assert torch.equal(values.t(), probs.topk(topk).values)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_scores_are_their_definitions_in_value_and_gradient(topk: int) -> None:
    """Against softmax and logsumexp of plain logits and autograd, in fp64."""
    torch.manual_seed(2)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits = x @ weight.t()
    probs, log_z = logits.softmax(-1), logits.logsumexp(-1)
    scores, tokens = route(x, weight, topk)
    weights = probs.gather(1, scores.choices_TK)
    found = scores.weights_TK, scores.probs_TE, scores.log_z_T, tokens
    wanted = weights, probs, log_z, x * 1.0
    for one, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, expected)
    torch.testing.assert_close(scores.log_probs_TE, logits.log_softmax(-1))
    factors = [torch.randn_like(one) for one in found]
    # Together and each alone: a gradient that is not there is no gradient of zeros.
    for used in ([0, 1, 2], [0], [1], [2], [3, 0, 2], [3]):
        mine, theirs = (
            torch.autograd.grad(
                sum((values[i] * factors[i]).sum() for i in used),
                (x, weight),
                retain_graph=True,
                materialize_grads=True,
            )
            for values in (found, wanted)
        )
        torch.testing.assert_close(mine, theirs)


def test_log_z_keeps_its_digits_where_one_logit_is_far_below() -> None:
    x, weight = torch.tensor([[1.0]]), torch.tensor([[-1.0e6], [0.25], [0.5]])
    expected = torch.tensor([[-1.0e6, 0.25, 0.5]], dtype=torch.float64).logsumexp(-1)
    torch.testing.assert_close(route(x, weight, 2)[0].log_z_T.double(), expected, rtol=1e-6, atol=0)


def test_a_frozen_router_passes_gradients_to_tokens_alone() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    route(x, weight, 2)[0].weights_TK.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_tokens_of_fewer_bits_keep_their_dtype_and_sum_both_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 4).bfloat16().requires_grad_(), torch.randn(5, 4).bfloat16()
    scores, tokens = route(x, weight, 2)
    assert tokens.dtype == torch.bfloat16
    assert scores.probs_TE.dtype == torch.float32
    factor = torch.randn_like(scores.weights_TK)
    (both,) = torch.autograd.grad((scores.weights_TK * factor).sum() + 3 * tokens.sum(), x)
    (routed,) = torch.autograd.grad((route(x, weight, 2)[0].weights_TK * factor).sum(), x)
    assert routed.abs().sum() > 0
    torch.testing.assert_close(both, routed + 3)


def test_a_second_derivative_is_an_error() -> None:
    """The gradient by hand has none; without the error it would be that of constants."""
    x = torch.randn(3, 4, requires_grad=True)
    scores, _ = route(x, torch.randn(5, 4), 2)
    (grad,) = torch.autograd.grad(scores.weights_TK.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
