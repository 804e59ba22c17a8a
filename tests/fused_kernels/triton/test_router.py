"""The router in Triton: the reference's choices, its numbers and gradients within rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import router as reference
from fused_kernels.triton import router

SIZES = [(1, 1, 1), (7, 45, 2), (32, 130, 2), (512, 21, 8), (8, 3, 8), (4, 0, 2)]
"""Experts, tokens, choices."""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores(device: torch.device, sizes: tuple[int, int, int]) -> None:
    experts, tokens, topk = sizes
    torch.manual_seed(experts)
    logits = (4 * torch.randn(experts, tokens)).to(device)
    found = router.forward(logits, topk)
    if not tokens:
        assert [x.shape for x in found] == [(4, 0), (4, 0), (0,), (2, 0), (2, 0)]
        return
    expected = reference.forward(logits.double(), topk)
    assert torch.equal(found[3], expected[3])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, atol=5e-6, rtol=5e-6)


def test_among_equals_the_lower_id_comes_first(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 1.0]], device=device)
    choices = router.forward(logits, 3)[3]
    assert choices.t().tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("experts", [3, 4])
def test_no_expert_is_chosen_twice_where_all_other_probabilities_are_zero(
    device: torch.device, experts: int
) -> None:
    """An fp32 probability is 0 from a distance of 104 on; so is that of the padding, expert 3."""
    logits = torch.full((experts, 1), -200.0, device=device)
    logits[1] = 0.0
    choices, weights = router.forward(logits, 3)[3:]
    assert choices.tolist() == [[1], [0], [2]]
    assert weights.tolist() == [[1.0], [0.0], [0.0]]


def test_far_logits(device: torch.device) -> None:
    """Their exponential overflows; their probabilities do not. One expert is ruled out."""
    logits = torch.tensor([[300.0], [299.0], [-torch.inf]], device=device)
    log_probs, probs, log_z, choices, weights = router.forward(logits, 2)
    expected = torch.tensor([300.0, 299.0]).double().softmax(0)
    torch.testing.assert_close(probs[:2, 0].double().cpu(), expected, atol=1e-7, rtol=1e-6)
    assert probs[2].item() == 0.0
    assert log_probs[2].item() == -torch.inf
    assert log_z.item() == pytest.approx(300.3132617)
    assert choices.tolist() == [[0], [1]]
    assert torch.equal(weights, probs[:2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_number_chooses_an_expert_that_exists(device: torch.device) -> None:
    """Its row of the buffer must exist; the loss then shows that something is wrong."""
    choices = router.forward(torch.full((5, 3), torch.nan, device=device), 2)[3]
    assert choices.min() >= 0
    assert choices.max() < 5


@pytest.mark.parametrize("given", [(1, 1, 1), (0, 0, 1), (1, 0, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_gradient(
    device: torch.device, sizes: tuple[int, int, int], given: tuple[int, int, int]
) -> None:
    """Against automatic differentiation in fp64 through whichever results have a gradient."""
    experts, tokens, topk = sizes
    torch.manual_seed(experts)
    logits = torch.randn(experts, tokens).to(device)
    _, probs, log_z, choices, _ = router.forward(logits, topk)
    slopes = [
        torch.randn(tokens),
        torch.randn(tokens, experts).t(),
        torch.randn(tokens, topk).t(),
    ]
    wanted = [slope.to(device) if one else None for slope, one in zip(slopes, given, strict=True)]
    exact = logits.double().requires_grad_()
    parts = exact.logsumexp(0), exact.softmax(0), exact.softmax(0).gather(0, choices)
    total = exact.sum() * 0
    for part, slope in zip(parts, wanted, strict=True):
        if slope is not None:
            total = total + (part * slope.double()).sum()
    (expected,) = torch.autograd.grad(total, exact)
    found = router.backward(wanted[0], wanted[1], wanted[2], probs, choices)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert log_z.shape == (tokens,)


@pytest.mark.parametrize("slopes", [1, 3, 45])
def test_sums_of_the_losses(device: torch.device, slopes: int) -> None:
    torch.manual_seed(0)
    probs = torch.randn(7, 45).softmax(0).t().to(device)
    log_z = torch.randn(45).to(device)
    load = torch.randint(0, 90, (slopes, 7)).to(device)
    found = router.loss_sums(probs, log_z, load)
    expected: list[Tensor] = [
        (probs.double() * load.repeat(45 // slopes, 1)).sum(),
        log_z.double().square().sum(),
    ]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == ()
        torch.testing.assert_close(mine.double(), theirs, atol=0, rtol=1e-5)
    torch.testing.assert_close(found, reference.loss_sums(probs, log_z, load))


def test_operands_that_do_not_fit_are_rejected(device: torch.device) -> None:
    probs, choices = torch.zeros(4, 3, device=device), torch.zeros(2, 3, device=device).long()
    with pytest.raises(ValueError, match=r"expected torch\.float32 \(4, 3\), found"):
        router.backward(None, probs.t(), None, probs, choices)
    with pytest.raises(ValueError, match=r"expected torch\.float32 \(2, 3\), found"):
        router.backward(None, None, probs, probs, choices)
