"""The gate in Triton against its formula and automatic differentiation in fp64."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.autograd import gated_silu as differentiable
from fused_kernels.triton import gated_silu
from tests.fused_kernels.test_gated_silu import formula, formula_and_gradient


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 37), (2, 3, 1030)], ids=str)
def test_both_passes(device: torch.device, shape: tuple[int, ...], blocks: int) -> None:
    torch.manual_seed(0)
    *rows, width = shape
    z, grad = torch.randn(*rows, blocks * width), torch.randn(shape)
    expected, expected_grad = formula_and_gradient(z, grad, blocks)
    h = gated_silu.forward(z.to(device), blocks)
    grad_z, again = gated_silu.backward(grad.to(device), z.to(device), blocks)
    assert torch.equal(h, again)
    assert torch.equal(gated_silu.gradient(grad.to(device), z.to(device), blocks), grad_z)
    for found, wanted in ((h, expected), (grad_z, expected_grad)):
        torch.testing.assert_close(found.cpu().double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [2, 3])
def test_in_double_precision(device: torch.device, blocks: int) -> None:
    z = torch.randn(2, blocks * 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: differentiable(t, blocks, gated_silu), z)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_gates_beyond_the_exponential(device: torch.device) -> None:
    gate = torch.tensor([[0.0, 88.0, 1e30, -80.0, -1e30, torch.nan]])
    z, grad = torch.cat([gate, torch.ones(1, 6)], 1).to(device), torch.ones(1, 6, device=device)
    grad_z, h = gated_silu.backward(grad, z, 2)
    expected = torch.tensor([[0.0, 88.0, 1e30, 0.0, 0.0, torch.nan]])
    slope = torch.tensor([[0.5, 1.0, 1.0, 0.0, 0.0, torch.nan]])
    torch.testing.assert_close(h.cpu(), expected, atol=1e-30, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad_z[:, :6].cpu(), slope, atol=1e-30, rtol=1e-6, equal_nan=True)


def test_steps_write_into_their_outputs_when_they_are_called(device: torch.device) -> None:
    z, grad = torch.randn(6, 8, device=device), torch.randn(6, 4, device=device)
    h, grad_z, again = (torch.zeros(6, width, device=device) for width in (4, 8, 4))
    forward = gated_silu.forward_step(z, 2, h)
    backward = gated_silu.backward_step(grad, z, 2, grad_z, again)
    assert not any(result.any() for result in (h, grad_z, again))
    forward()
    backward()
    torch.testing.assert_close(h, formula(z, 2))
    torch.testing.assert_close((grad_z, again), gated_silu.backward(grad, z, 2))


def test_operands_that_do_not_fit_are_rejected(device: torch.device) -> None:
    z, h = torch.zeros(4, 6, device=device), torch.zeros(4, 3, device=device)
    for blocks, wrong, into in ((4, z, h), (3, z, h), (2, z.double(), h), (2, z, h[:3])):
        with pytest.raises(ValueError, match="expected"):
            gated_silu.forward_step(wrong, blocks, into)
    with pytest.raises(ValueError, match="contiguous"):
        gated_silu.forward_step(torch.zeros(6, 4, device=device).t(), 2, h)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [2, 3])
def test_bfloat16_is_rounded_once(blocks: int) -> None:
    z = torch.randn(50, blocks * 304, device="cuda").bfloat16()
    grad = torch.randn(50, 304, device="cuda").bfloat16()
    expected, expected_grad = formula_and_gradient(z, grad, blocks)
    grad_z, h = gated_silu.backward(grad, z, blocks)
    for found, wanted in ((h, expected), (grad_z, expected_grad)):
        allowed = 0.503 * 2**-7 * wanted.abs() + 1e-6
        assert ((found.double() - wanted).abs() <= allowed).all()
