"""Vocabulary-parallel cross entropy and z-term against PyTorch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from tests.support.pool import Pool

VOCAB, SEQ, ROWS, HIDDEN = 12, 5, 2, 6
SCALE = 0.3


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(SEQ, ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator)
    target = torch.randint(0, VOCAB, (SEQ, ROWS), generator=generator)
    weights = torch.randn(2, SEQ, ROWS, dtype=torch.float64, generator=generator)
    return x, weight, target, weights


def _expected(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients in fp64, of operands rounded to ``dtype``."""
    x, weight, target, weights = _inputs()
    x, weight = (each.to(dtype).double().requires_grad_() for each in (x, weight))
    logits = SCALE * x @ weight.t()
    ce = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    both = torch.stack((ce.view(SEQ, ROWS), logits.logsumexp(-1).square()))
    (both * weights).sum().backward()
    assert x.grad is not None and weight.grad is not None
    return both.detach(), x.grad, weight.grad


def split_loss(rank: int, world_size: int, chunk: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Losses, the gradients of the input (of all ranks) and of this rank's rows of the weight, and
    the collectives that this took.
    """
    from fused_kernels import select
    from megatron_moe.model.loss import linear_cross_entropy

    x, weight, target, weights = _inputs()
    rows = VOCAB // world_size
    x.requires_grad_()
    mine = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    kernel = select("linear_cross_entropy").module
    with _collectives() as called:
        losses = linear_cross_entropy(
            x,
            mine,
            target,
            kernel,
            dist.group.WORLD,
            SCALE,
            chunk,  # type: ignore[arg-type]
        )
        (losses * weights).sum().backward()
    assert x.grad is not None and mine.grad is not None
    dist.all_reduce(x.grad)
    return losses.detach(), x.grad, mine.grad, called


@contextmanager
def _collectives() -> Iterator[list[str]]:
    """Names of the collectives of `torch.distributed` that are called inside."""
    names = ["all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"]
    before, called = {name: getattr(dist, name) for name in names}, []

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return before[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, noted(name))
    try:
        yield called
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


@pytest.mark.parametrize("chunk", [1, 3, 10], ids="chunk {}".format)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_pytorch(pool: Pool, world_size: int, chunk: int) -> None:
    losses, grad_x, grad_weight = _expected()
    results = pool.run(split_loss, world_size, chunk=chunk)
    for found, found_x, _, called in results:
        torch.testing.assert_close(found, losses)
        torch.testing.assert_close(found_x, grad_x)
        # One for all chunks, however many; none on one rank.
        assert called == ["all_gather_into_tensor"] * (world_size > 1)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), grad_weight)
    assert all(torch.equal(results[0][0], r[0]) for r in results), "the same loss on every rank"


def accumulated(rank: int, world_size: int, main_dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """Two micro-batches through a bf16 weight that the data-parallel wrapper has marked."""
    from fused_kernels import select
    from megatron_moe.model.loss import linear_cross_entropy

    x, weight, target, weights = _inputs()
    weight = torch.nn.Parameter(weight.bfloat16())
    weight.main_grad = torch.full_like(weight, 0.5, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    kernel = select("linear_cross_entropy").module
    for _ in range(2):
        losses = linear_cross_entropy(
            x.bfloat16(),
            weight,
            target,
            kernel,
            dist.group.WORLD,
            SCALE,
            3,  # type: ignore[arg-type]
        )
        (losses * weights).sum().backward()
    return {"main": weight.main_grad, "grad": weight.grad, "added": weight.grad_added_to_main_grad}


@pytest.mark.parametrize("tied", [False, True])
def test_the_weight_s_gradient_is_added_to_main_grad(pool: Pool, tied: bool) -> None:
    """As Megatron-Core's linear layers do: fp32 sums of bf16 weights, rounded nowhere.

    What autograd returns besides is not read, but zero for a tied embedding, to which the
    embedding's own gradient is added.
    """
    (found,) = pool.run(accumulated, 1, main_dtype=torch.float32, tied=tied)
    exact = _expected(torch.bfloat16)[2]
    assert found["added"]
    torch.testing.assert_close(found["main"].double(), 0.5 + 2 * exact, rtol=1e-5, atol=1e-4)
    if tied:
        assert (found["grad"] == 0).all()


def test_a_main_grad_of_another_dtype_is_left_to_the_wrapper(pool: Pool) -> None:
    (found,) = pool.run(accumulated, 1, main_dtype=torch.bfloat16, tied=False)
    assert not found["added"]
    assert (found["main"] == 0.5).all()
    exact = _expected(torch.bfloat16)[2]
    torch.testing.assert_close(found["grad"].double(), 2 * exact, rtol=2**-7, atol=1e-3)


def test_chunks_are_of_bounded_size_and_not_too_small() -> None:
    from megatron_moe.model.logits_chunks import chunk_tokens

    assert chunk_tokens(4096) == 32768  # 512 MiB of fp32
    assert chunk_tokens(256384 // 8) == 2**27 // 32048
    assert chunk_tokens(256384) == 1024  # 1 GiB: fewer would wait for memory


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
