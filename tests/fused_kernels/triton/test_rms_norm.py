"""RMSNorm in Triton against the reference and automatic differentiation in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.autograd import rms_norm as differentiable
from fused_kernels.reference import rms_norm as reference
from fused_kernels.triton import rms_norm

EPS = 1e-3
SHAPES = [(0, 5), (1, 1), (3, 2, 7), (70, 33), (5, 2048), (2, 3000)]


def by_definition(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes(device: torch.device, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).to(device) for _ in range(2))
    weight = (1 + torch.randn(shape[-1])).to(device)
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    expected = by_definition(exact_x, exact_weight)
    wanted = torch.autograd.grad(expected, (exact_x, exact_weight), grad.double())
    y, inverse = rms_norm.forward(x, weight, EPS)
    found = (y, *rms_norm.backward(grad, x, weight, inverse))
    for mine, theirs in zip(found, (expected, *wanted), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.detach(), atol=3e-5, rtol=3e-5)
    torch.testing.assert_close((y, inverse), reference.forward(x, weight, EPS))


def test_rows_over_several_programs_are_counted_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 rows: programs of 5 rows, which they take 4 at a time, and the last of 3."""
    monkeypatch.setattr(rms_norm, "PARTS", 5)
    monkeypatch.setattr(rms_norm, "ELEMENTS", 16)
    x, grad = torch.randn(23, 4, device=device), torch.randn(23, 4, device=device)
    weight = torch.randn(4, device=device)
    _, inverse = rms_norm.forward(x, weight, EPS)
    found = rms_norm.backward(grad, x, weight, inverse)
    torch.testing.assert_close(found, reference.backward(grad, x, weight, inverse))


def test_in_double_precision(device: torch.device) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, device=device).t().requires_grad_()
    weight = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: differentiable(*t, EPS, rms_norm), (x, weight))


def test_rows_that_no_program_holds_are_rejected(device: torch.device) -> None:
    wide = torch.zeros(1, rms_norm.WIDEST + 1, device=device)
    with pytest.raises(ValueError, match="rows of 16385, expected at most 16384; use reference"):
        rms_norm.forward(wide, wide[0], EPS)


@pytest.mark.gpu
def test_bfloat16_is_cast_before_it_is_scaled_as_in_the_reference() -> None:
    x = torch.randn(64, 520, device="cuda").bfloat16()
    weight = torch.randn(520, device="cuda").bfloat16()
    y, inverse = rms_norm.forward(x, weight, EPS)
    expected, exact_inverse = reference.forward(x, weight, EPS)
    torch.testing.assert_close(inverse, exact_inverse)
    # Where the two reciprocal roots differ in their last bit, a value may round the other way.
    assert (y != expected).float().mean() < 0.01
    grad = torch.randn_like(x)
    found = rms_norm.backward(grad, x, weight, inverse)
    torch.testing.assert_close(found, reference.backward(grad, x, weight, inverse))
