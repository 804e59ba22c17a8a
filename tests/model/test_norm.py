"""The norm against its definition in fp64, and its hand-written gradient against autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config import ParallelConfig, RunConfig
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from tests.support.pool import Pool
from tests.support.saved import saved_bytes

activate()

from megatron_moe.model.norm import RMSNorm, SplitRMSNorm  # noqa: E402

EPS = 1e-2
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def norm(width: int, dtype: torch.dtype) -> RMSNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=True)
    layer = RMSNorm(config, width, EPS)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    layer.weight.data.copy_(1 + torch.randn(width, generator=generator))
    return layer


def by_definition(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def test_value_and_gradient_are_those_of_the_definition() -> None:
    torch.manual_seed(1)
    layer = norm(7, torch.float64)
    x = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    twin, weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone()
    weight.requires_grad_()
    upstream = torch.randn(3, 2, 7, dtype=torch.float64)
    found, expected = layer(x), by_definition(twin, weight)
    torch.testing.assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_gradient_of_a_transposed_input_and_gradient() -> None:
    layer = norm(4, torch.float64)
    x = torch.randn(3, 5, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: layer(y).transpose(0, 1), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_other_devices_path(dtype: torch.dtype) -> None:
    """Elsewhere PyTorch's fused norm is called; in bf16 both round before scaling, as T5 does."""
    layer = norm(64, dtype)
    x = torch.randn(9, 64).to(dtype)
    expected = F.rms_norm(x.float(), (64,), None, EPS).to(dtype) * layer.weight
    torch.testing.assert_close(
        layer(x), expected, rtol=2e-6 if dtype == torch.float32 else 0.01, atol=0
    )
    exact = (layer(x) == expected).float().mean()
    assert exact > 0.99 or dtype == torch.float32


def test_a_row_of_zeros_has_finite_gradients() -> None:
    layer = norm(4, torch.float32)
    x = torch.zeros(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(x.grad, (layer.weight / EPS**0.5).expand(2, 4).detach())


def split_norm(rank: int, world_size: int, x: Tensor, weight: Tensor, upstream: Tensor) -> Any:
    """This rank's heads of the output, and the gradients of its heads and weight."""
    pgs = initialize_parallel(
        resolve_layout(RunConfig(parallel=TP2), world_size, None), TP2, activate(), 1
    ).pgs
    _, _, heads, width = x.shape
    config = SimpleNamespace(params_dtype=torch.float64)
    layer = SplitRMSNorm(config, width, heads, pgs.tp, EPS)  # type: ignore[arg-type]
    own = slice(rank * heads // 2, (rank + 1) * heads // 2)
    layer.weight.data.copy_(weight.view(heads, width)[own].flatten())
    mine = x[:, :, own].clone().requires_grad_()
    found = layer(mine)
    found.backward(upstream[:, :, own])
    assert layer.weight.grad is not None
    return found.detach(), mine.grad, layer.weight.grad.view(-1, width)


def test_heads_on_several_ranks_have_one_mean_square(pool: Pool) -> None:
    torch.manual_seed(3)
    x, upstream = (torch.randn(3, 2, 4, 5, dtype=torch.float64) for _ in range(2))
    x *= torch.tensor([1.0, 5.0, 0.2, 3.0])[:, None]  # heads of different sizes
    weight = torch.randn(20, dtype=torch.float64)
    whole, scale = x.flatten(-2).requires_grad_(), weight.clone().requires_grad_()
    expected = by_definition(whole, scale)
    expected.backward(upstream.flatten(-2))
    ranks = pool.run(split_norm, 2, x=x, weight=weight, upstream=upstream)
    found, grad, grad_weight = (torch.cat(each, -2) for each in zip(*ranks, strict=True))
    torch.testing.assert_close(found, expected.view_as(x))
    assert whole.grad is not None and scale.grad is not None
    torch.testing.assert_close(grad, whole.grad.view_as(x))
    torch.testing.assert_close(grad_weight.flatten(), scale.grad)


def test_the_backward_pass_keeps_the_input_and_a_number_for_each_row() -> None:
    """In bfloat16: no fp32 copy of the activations, which would be twice their size again."""
    layer = norm(64, torch.bfloat16)
    x = torch.randn(9, 5, 64).bfloat16().requires_grad_()
    assert saved_bytes(lambda: layer(x)) == 2 * x.numel() + 4 * 9 * 5 + 2 * 64
