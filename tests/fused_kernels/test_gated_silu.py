"""The gate against its formula and against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kernels.reference import _blocks
from fused_kernels.reference import gated_silu as kernel


def formula(z: Tensor, blocks: int) -> Tensor:
    if blocks == 2:
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    a, b, up = z.chunk(3, dim=-1)
    return a * F.silu(b) * up


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("rows", [0, 1, 5, 41])
def test_value_and_gradient(monkeypatch, blocks: int, rows: int) -> None:
    monkeypatch.setattr(_blocks, "CACHED_ELEMENTS", 70)  # Blocks of 10 rows, the last one shorter.
    torch.manual_seed(0)
    z = torch.randn(rows, blocks * 7, dtype=torch.float64, requires_grad=True)
    grad_h = torch.randn(rows, 7, dtype=torch.float64)
    expected = formula(z, blocks)
    (expected_grad,) = torch.autograd.grad(expected, z, grad_h)
    torch.testing.assert_close(kernel.forward(z.detach(), blocks), expected.detach())
    grad_z, again = kernel.backward(grad_h.clone(), z.detach(), blocks)
    torch.testing.assert_close(grad_z, expected_grad)
    torch.testing.assert_close(again, expected.detach())


def test_steps_do_nothing_until_they_are_called_and_write_where_they_are_told() -> None:
    z, grad = torch.randn(6, 8), torch.randn(6, 4)
    h, grad_z, again = torch.zeros(6, 4), torch.zeros(6, 8), torch.zeros(6, 4)
    forward = kernel.forward_step(z, 2, h)
    backward = kernel.backward_step(grad.clone(), z, 2, grad_z, again)
    assert not any(result.any() for result in (h, grad_z, again))
    forward()
    backward()
    expected = kernel.backward(grad.clone(), z, 2)
    torch.testing.assert_close((h, grad_z, again), (kernel.forward(z, 2), *expected))


@pytest.mark.parametrize("blocks", [2, 3])
def test_the_differentiable_form(blocks: int) -> None:
    z = torch.randn(3, 5, blocks * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kernel.gated_silu(t, blocks), z)


def test_the_gradient_handed_in_is_left_alone() -> None:
    z = torch.randn(4, 6, requires_grad=True)
    grad = torch.randn(4, 3)
    before = grad.clone()
    kernel.gated_silu(z, 2).backward(grad)
    assert torch.equal(grad, before)
