"""Rotary positions in Triton: those of the reference, of views and of whole tensors."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.autograd import rotary as differentiable
from fused_kernels.reference import rotary as reference
from fused_kernels.triton import rotary


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "sizes", [(5, 2, 3, 10), (1, 1, 1, 2), (3, 1, 40, 128), (0, 2, 3, 4)], ids=str
)
def test_both_passes_of_a_view(
    device: torch.device, sizes: tuple[int, int, int, int], by_row: bool
) -> None:
    """Queries beside keys and values, as a fused projection gives them."""
    length, batch, _, dim = sizes
    torch.manual_seed(0)
    fused = torch.randn(*sizes[:3], 3 * dim).to(device)
    x, shape = (
        fused[..., dim : 2 * dim],
        (length, batch, dim // 2) if by_row else (length, dim // 2),
    )
    angle = torch.randn(shape).to(device)
    cos, sin = angle.cos(), angle.sin()
    found, expected = rotary.forward(x, cos, sin), reference.forward(x, cos, sin)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    # The gradient of attention comes transposed.
    grad = torch.randn(batch, sizes[2], length, dim).to(device).permute(2, 0, 1, 3)
    torch.testing.assert_close(rotary.backward(grad, cos, sin), reference.backward(grad, cos, sin))
    torch.testing.assert_close(
        rotary.backward(found, cos, sin), x.contiguous(), atol=1e-5, rtol=1e-5
    )


def test_in_double_precision_and_of_heads_that_are_not_whole(device: torch.device) -> None:
    x = torch.randn(2, 1, 1, 2, dtype=torch.float64, device=device)
    x = x.permute(3, 1, 2, 0).requires_grad_()
    angle = torch.randn(2, 1, dtype=torch.float64, device=device)
    cos, sin = angle.cos(), angle.sin()
    assert torch.autograd.gradcheck(lambda y: differentiable(y, cos, sin, rotary), x)


def test_angles_that_do_not_fit_are_rejected(device: torch.device) -> None:
    x, cos = torch.zeros(4, 2, 1, 6, device=device), torch.zeros(3, 3, device=device)
    with pytest.raises(ValueError, match=r"expected torch\.float32 \(4, 3\)"):
        rotary.forward(x, cos, cos)


@pytest.mark.gpu
def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(7, 2, 24, 128, device="cuda").bfloat16()
    angle = torch.randn(7, 64, device="cuda")
    exact = reference.forward(x.double(), angle.double().cos(), angle.double().sin())
    found = rotary.forward(x, angle.cos(), angle.sin()).double()
    assert ((found - exact).abs() <= 0.502 * 2**-7 * exact.abs() + 1e-5).all()
