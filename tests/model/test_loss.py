"""Vocabulary-parallel cross entropy and z-term against PyTorch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.support.pool import Pool

VOCAB, SEQ, ROWS = 12, 5, 2
SCALE = 0.3


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(SEQ, ROWS, VOCAB, dtype=torch.float64, generator=generator)
    target = torch.randint(0, VOCAB, (SEQ, ROWS), generator=generator)
    weights = torch.randn(2, SEQ, ROWS, dtype=torch.float64, generator=generator)
    return logits, target, weights


def _expected() -> tuple[Tensor, Tensor]:
    logits, target, weights = _inputs()
    logits.requires_grad_()
    ce = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    both = torch.stack((ce.view(SEQ, ROWS), logits.logsumexp(-1).square()))
    (both * weights).sum().backward()
    assert logits.grad is not None
    return both.detach(), logits.grad


def split_loss(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of this rank's columns."""
    from megatron_moe.model.loss import vocab_parallel_loss

    logits, target, weights = _inputs()
    columns = VOCAB // world_size
    mine = logits[..., rank * columns : (rank + 1) * columns].clone().requires_grad_()
    losses = vocab_parallel_loss(mine * 1.0, target, dist.group.WORLD)
    (losses * weights).sum().backward()
    assert mine.grad is not None
    return losses.detach(), mine.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_pytorch(pool: Pool, world_size: int) -> None:
    losses, grad = _expected()
    results = pool.run(split_loss, world_size)
    for found, _ in results:
        torch.testing.assert_close(found, losses)
    torch.testing.assert_close(torch.cat([g for _, g in results], dim=-1), grad)


def logits_in_bf16(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of bf16 operands, and the gradients of a weighted sum."""
    from megatron_moe.model.loss import _Fp32Matmul

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(8, 64, generator=generator).bfloat16().requires_grad_()
    logits = _Fp32Matmul.apply(x, weight, SCALE)
    (logits * torch.arange(8.0)).sum().backward()
    assert x.grad is not None and weight.grad is not None
    return logits.detach(), x.grad, weight.grad


def test_bf16_weights_give_fp32_logits(pool: Pool) -> None:
    ((logits, x_grad, weight_grad),) = pool.run(logits_in_bf16, 1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 64, generator=generator).bfloat16().double().requires_grad_()
    weight = torch.randn(8, 64, generator=generator).bfloat16().double().requires_grad_()
    exact = SCALE * x @ weight.t()
    (exact * torch.arange(8.0)).sum().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x_grad, x.grad.bfloat16())
    torch.testing.assert_close(weight_grad, weight.grad.bfloat16(), rtol=1e-2, atol=1e-1)
