"""The gate against its formula and against automatic differentiation."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kernels import row_blocks, select
from fused_kernels.autograd import gated_silu


@pytest.fixture
def kernel(implementation: str) -> ModuleType:
    return select("gated_silu", implementation).module


def formula(z: Tensor, blocks: int) -> Tensor:
    if blocks == 2:
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    a, b, up = z.chunk(3, dim=-1)
    return a * F.silu(b) * up


def formula_and_gradient(z: Tensor, grad_h: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """In fp64, whatever comes in."""
    z = z.detach().double().clone().requires_grad_()
    h = formula(z, blocks)
    return h.detach(), torch.autograd.grad(h, z, grad_h.double())[0]


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("rows", [0, 1, 5, 41])
def test_value_and_gradient(monkeypatch, kernel: ModuleType, blocks: int, rows: int) -> None:
    monkeypatch.setattr(
        row_blocks, "CACHED_ELEMENTS", 70
    )  # Blocks of 10 rows, the last one shorter.
    torch.manual_seed(0)
    z, grad_h = (torch.randn(rows, width, dtype=torch.float64) for width in (blocks * 7, 7))
    expected, expected_grad = formula_and_gradient(z, grad_h, blocks)
    torch.testing.assert_close(kernel.forward(z, blocks), expected)
    grad_z, again = kernel.backward(grad_h.clone(), z, blocks)
    torch.testing.assert_close(grad_z, expected_grad)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("shape", [(0, 7), (41, 7), (5, 3, 16)], ids=str)
def test_the_gradient_alone_is_that_of_the_whole_pass(
    monkeypatch, kernel: ModuleType, blocks: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(row_blocks, "CACHED_ELEMENTS", 70)
    torch.manual_seed(0)
    grad_h = torch.randn(shape)
    z = torch.randn(*shape[:-1], blocks * shape[-1])
    expected, _ = kernel.backward(grad_h.clone(), z, blocks)
    assert torch.equal(kernel.gradient(grad_h.clone(), z, blocks), expected)
    strided = z.transpose(0, -1).contiguous().transpose(0, -1)
    torch.testing.assert_close(kernel.gradient(grad_h.clone(), strided, blocks), expected)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "units"), [(torch.float32, 8), (torch.bfloat16, 1.3)], ids=["float32", "bfloat16"]
)
def test_low_precision(kernel: ModuleType, dtype: torch.dtype, units: float, blocks: int) -> None:
    """Within so many units in the last place of fp64, for gates far from zero as well."""
    torch.manual_seed(0)
    z = (torch.randn(67, blocks * 301) * torch.logspace(-3, 1.3, 67).unsqueeze(1)).to(dtype)
    grad_h = torch.randn(67, 301).to(dtype)
    expected, expected_grad = formula_and_gradient(z, grad_h, blocks)
    grad_z, again = kernel.backward(grad_h.clone(), z, blocks)
    unit = torch.finfo(dtype).eps
    # Near its zero the slope of silu is a difference: what is lost there is as of a slope of 0.01.
    largest_R1 = z.double().abs().amax(1, keepdim=True)
    floor = 0.01 * grad_h.abs().max() * largest_R1 ** (blocks - 1)
    for found, exact in ((again, expected), (grad_z, expected_grad)):
        allowed = units * unit * exact.abs().clamp(min=1e-30)
        if found is grad_z:
            allowed = allowed.maximum(units * unit * floor)
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= allowed).all()
    assert torch.equal(kernel.forward(z, blocks), again)


@pytest.mark.parametrize("blocks", [2, 3])
def test_compiled_code_rounds_bfloat16_once(compiled: None, blocks: int) -> None:
    """To the nearest: half a unit in the last place, and what fp32 adds."""
    kernel = select("gated_silu", "native").module
    z, grad_h = (torch.randn(50, width).bfloat16() for width in (blocks * 301, 301))
    expected, expected_grad = formula_and_gradient(z, grad_h, blocks)
    grad_z, h = kernel.backward(grad_h, z, blocks)
    for found, exact in ((h, expected), (grad_z, expected_grad)):
        allowed = 0.503 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-6
        assert ((found.double() - exact).abs() <= allowed).all()


def test_gates_beyond_the_exponential(kernel: ModuleType) -> None:
    """Silu is its input far above zero, nothing far below, and not a number of what is none."""
    gate = torch.tensor([[0.0, 88.0, 89.0, 1e30, -80.0, -89.0, -1e30, torch.nan]])
    z, grad = torch.cat([gate, torch.ones(1, 8)], dim=1), torch.ones(1, 8)
    h = kernel.forward(z, 2)
    grad_z, again = kernel.backward(grad.clone(), z, 2)
    expected = torch.tensor([[0.0, 88.0, 89.0, 1e30, 0.0, 0.0, 0.0, torch.nan]])
    slope = torch.tensor([[0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, torch.nan]])
    torch.testing.assert_close(h, expected, atol=1e-30, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(again, h, atol=0.0, rtol=0.0, equal_nan=True)
    torch.testing.assert_close(grad_z[:, :8], slope, atol=1e-30, rtol=1e-6, equal_nan=True)


def test_steps_write_into_their_outputs_when_they_are_called(
    kernel: ModuleType,
) -> None:
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
def test_the_differentiable_form(kernel: ModuleType, blocks: int) -> None:
    z = torch.randn(3, 5, blocks * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gated_silu(t, blocks, kernel), z)


def test_gradients_and_inputs_that_are_not_contiguous(kernel: ModuleType) -> None:
    z = torch.randn(6, 4, dtype=torch.float64).t().requires_grad_()
    grad = torch.randn(3, 1, dtype=torch.float64).t().expand(4, 3)
    h = gated_silu(z, 2, kernel)
    (found,) = torch.autograd.grad(h, z, grad)
    expected, expected_grad = formula_and_gradient(z.detach(), grad, 2)
    torch.testing.assert_close((h.detach(), found), (expected, expected_grad))


def test_the_gradient_handed_in_is_left_alone(kernel: ModuleType) -> None:
    z = torch.randn(4, 6, requires_grad=True)
    grad = torch.randn(4, 3)
    before = grad.clone()
    gated_silu(z, 2, kernel).backward(grad)
    assert torch.equal(grad, before)
    after = grad.clone()
    kernel.backward(after, z.detach(), 2)
    assert kernel.OVERWRITES_GRADIENT is not torch.equal(after, before)
