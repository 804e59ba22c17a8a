"""Statistics and gradients of logits in Triton against automatic differentiation in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import linear_cross_entropy as reference
from fused_kernels.triton import linear_cross_entropy
from tests.fused_kernels.test_linear_cross_entropy import (
    SCALE,
    TOLERANCE,
    computed,
    expected,
    operands,
)

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def on(device: torch.device, given: Operands) -> Operands:
    x_TH, weight_VH, target_T, weights_2T = (each.to(device) for each in given)
    return x_TH, weight_VH, target_T, weights_2T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 1000], ids="chunk {}".format)
@pytest.mark.parametrize("shape", [(13, 37, 24), (1, 1, 8), (8, 300, 16)], ids=str)
def test_equals_fp64_autograd(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    chunk: int,
    dtype: torch.dtype,
) -> None:
    """300 columns are five blocks of 64, of which the last is not full."""
    monkeypatch.setattr(linear_cross_entropy, "COLUMNS", 64)
    given = operands(*shape, dtype)
    found = computed(linear_cross_entropy, on(device, given), chunk, before=0.5)
    wanted = expected(*given)
    for mine, exact, before in zip(found, wanted, (0, 0, 0, 0.5), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.cpu().double() - before, exact, **TOLERANCE[dtype])


def test_logits_that_grow_block_by_block(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block has a new maximum, far above the last one, and in the other row none has."""
    monkeypatch.setattr(linear_cross_entropy, "COLUMNS", 16)
    weight_VH = torch.arange(80.0).unsqueeze(1).to(device)
    x_TH = torch.tensor([[30.0], [-30.0]], device=device)
    target_T = torch.tensor([79, 0], device=device)
    stats_3T, _ = linear_cross_entropy.forward(x_TH, weight_VH, target_T, 1.0, 2)
    assert stats_3T.tolist() == [[2370.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_no_tokens_and_no_gradient_of_the_weight(device: torch.device) -> None:
    losses, _, grad_x, grad_weight = computed(
        linear_cross_entropy, on(device, operands(0, 5, 8, torch.float32)), 4, before=0.5
    )
    assert (losses.shape, grad_x.shape) == ((2, 0), (0, 8))
    assert (grad_weight == 0.5).all()
    x_TH, weight_VH, target_T, weights_2T = on(device, operands(6, 10, 8, torch.float32))
    stats_3T, kept = linear_cross_entropy.forward(x_TH, weight_VH, target_T, SCALE, 4)
    log_z_T = stats_3T[0] + stats_3T[1].log()
    given = x_TH, weight_VH, target_T, SCALE, stats_3T, log_z_T, weights_2T.float()
    wanted = reference.backward(
        *given, reference.forward(x_TH, weight_VH, target_T, SCALE, 4)[1], None
    )
    torch.testing.assert_close(linear_cross_entropy.backward(*given, kept, None), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [64, 1000])
def test_bf16_tokens_round_the_gradient_of_the_logits_once(chunk: int) -> None:
    given = operands(200, 4100, 64, torch.bfloat16)
    found = computed(linear_cross_entropy, on(torch.device("cuda"), given), chunk)
    wanted = expected(*given)
    torch.testing.assert_close(found[0].cpu().double(), wanted[0], rtol=1e-5, atol=1e-5)
    for mine, exact in zip(found[2:], wanted[2:], strict=True):
        error = (mine.cpu().double() - exact).norm() / exact.norm()
        assert error < 2**-8, error
