"""Both ways to run the experts against automatic differentiation of the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_kernels.reference import gated_silu
from megatron_moe.moe import expert_gemm
from megatron_moe.moe.expert_gemm import ExpertBucket, ExpertRows, make_buckets
from tests.support.emulated_gpu import emulated_gpu

HIDDEN, FFN = 5, 3


def plain(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One expert."""
    *linear, gate, up = (x @ w_in).split(FFN, dim=-1)
    h = F.silu(gate) * up
    return (h * linear[0] if linear else h) @ w_out


def weights(experts: int, blocks: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    w_in = torch.randn(experts, HIDDEN, blocks * FFN, dtype=torch.float64)
    w_out = torch.randn(experts, FFN, HIDDEN, dtype=torch.float64)
    return w_in.requires_grad_(), w_out.requires_grad_()


COUNTS = {
    "uneven": [[3, 1, 4, 2]],
    "an empty expert": [[3, 0, 4, 0]],
    "all to one": [[0, 0, 9, 0]],
    "nothing": [[0, 0, 0, 0]],
    "two sources": [[3, 1, 0, 2], [0, 5, 0, 1]],
}


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_loop(counts: list[list[int]], blocks: int) -> None:
    block_rows = 11
    w_in, w_out = weights(4, blocks)
    rows = block_rows * len(counts)
    x = torch.randn(rows, HIDDEN, dtype=torch.float64, requires_grad=True)
    filled = expert_gemm.filled_rows(counts, block_rows)
    y = expert_gemm.loop(x, w_in, w_out, filled, gated_silu)
    expected = torch.zeros_like(x)
    for s in filled:
        mine = slice(s.start, s.start + s.rows)
        expected[mine] = plain(x[mine], w_in[s.expert], w_out[s.expert])
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(x)
    leaves = (x, w_in, w_out)
    if not filled:
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(y, leaves, grad))
        return
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


def test_filled_rows_of_two_sources() -> None:
    assert expert_gemm.filled_rows([[2, 0, 1], [0, 3, 0]], 5) == [
        ExpertRows(0, 0, 2), ExpertRows(2, 2, 1), ExpertRows(1, 5, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "buckets",
    [
        [ExpertBucket(4, 6)],
        [ExpertBucket(2, 5), ExpertBucket(2, 3)],
        [ExpertBucket(3, 4), ExpertBucket(1, 0)],
    ],
)
@pytest.mark.parametrize("blocks", [2, 3])
def test_batched(blocks: int, buckets: list[ExpertBucket]) -> None:
    w_in, w_out = weights(4, blocks)
    sizes = [p.rows for p in buckets for _ in range(p.experts)]
    x = torch.randn(sum(sizes), HIDDEN, dtype=torch.float64, requires_grad=True)
    y = expert_gemm.batched(x, w_in, w_out, buckets, gated_silu)
    expected = torch.cat([plain(*each) for each in zip(x.split(sizes), w_in, w_out, strict=True)])
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(x)
    leaves = (x, w_in, w_out)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


def test_buckets_pad_to_the_fullest_of_a_few() -> None:
    many = 2 * expert_gemm.LEAST_GATE_ELEMENTS
    assert make_buckets([3, 5, 2, 0, 7], many, threads=2) == [
        ExpertBucket(2, 5), ExpertBucket(2, 2), ExpertBucket(1, 7)
    ]  # fmt: skip
    assert make_buckets([3, 5, 2], 1, threads=2) == [ExpertBucket(3, 5)]
    assert make_buckets([3, 5, 2], many) == [ExpertBucket(3, 5)]
    assert make_buckets([0, 0], many, threads=2) == [ExpertBucket(2, 0)]


@pytest.mark.parametrize("way", ["loop", "batched"])
def test_gradcheck(way: str) -> None:
    w_in, w_out = weights(2, 3)
    x = torch.randn(6, HIDDEN, dtype=torch.float64, requires_grad=True)
    filled = expert_gemm.filled_rows([[4, 2]], 6)

    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        if way == "loop":
            return expert_gemm.loop(x, w_in, w_out, filled, gated_silu)
        return expert_gemm.batched(x, w_in, w_out, [ExpertBucket(2, 3)], gated_silu)

    assert torch.autograd.gradcheck(run, (x, w_in, w_out))


@pytest.mark.parametrize("way", ["loop", "batched"])
def test_with_megatrons_wrapper_gradients_are_added_to_main_grad_once(way: str) -> None:
    """Two micro-batches: main_grad holds the sum, the flag is set, `.grad` is not to be read."""
    w_in, w_out = (nn.Parameter(w.detach()) for w in weights(2, 2))
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64)
    filled = expert_gemm.filled_rows([[4, 4]], 8)

    def run() -> Tensor:
        if way == "loop":
            return expert_gemm.loop(x.flatten(0, 1), w_in, w_out, filled, gated_silu).sum()
        buckets = [ExpertBucket(1, 4), ExpertBucket(1, 4)]
        return expert_gemm.batched(x.flatten(0, 1), w_in, w_out, buckets, gated_silu).sum()

    expected = torch.autograd.grad(run(), (w_in, w_out))
    for weight in (w_in, w_out):
        weight.main_grad = torch.ones_like(weight)
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        run().backward()
    for weight, grad in zip((w_in, w_out), expected, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, 1 + 2 * grad)


def test_a_main_grad_of_less_precision_is_left_to_megatron_core() -> None:
    """fp64 weights, as in these tests alone."""
    w_in, w_out = (nn.Parameter(w.detach()) for w in weights(1, 2))
    w_in.main_grad = torch.zeros_like(w_in, dtype=torch.float32)
    w_in.grad_added_to_main_grad = False
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    expert_gemm.batched(x, w_in, w_out, [ExpertBucket(1, 4)], gated_silu).sum().backward()
    assert w_in.grad is not None
    assert not w_in.grad_added_to_main_grad
    assert w_in.main_grad.abs().max() == 0


def _half_precision_weights() -> tuple[nn.Parameter, nn.Parameter]:
    """bf16 weights with an fp32 sum of earlier gradients, which bf16 could not hold."""
    w_in, w_out = (nn.Parameter(w.detach().bfloat16()) for w in weights(2, 3))
    for weight in (w_in, w_out):
        weight.main_grad = torch.full_like(weight, 1000.25, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    return w_in, w_out


def _accumulated(way: str, device: str) -> tuple[list[Tensor], Tensor]:
    """Sums after two micro-batches, and the input's gradient."""
    pair = _half_precision_weights()
    if device == "cuda":
        mains = [weight.main_grad.to(device) for weight in pair]
        pair = tuple(nn.Parameter(weight.detach().to(device)) for weight in pair)
        for weight, main in zip(pair, mains, strict=True):
            weight.main_grad, weight.grad_added_to_main_grad = main, False
    torch.manual_seed(3)
    for _ in range(2):
        x = torch.randn(8, HIDDEN).bfloat16().to(device).requires_grad_()
        if way == "loop":
            y = expert_gemm.loop(x, *pair, expert_gemm.filled_rows([[5, 3]], 8), gated_silu)
        else:
            y = expert_gemm.batched(x, *pair, [ExpertBucket(2, 4)], gated_silu)
        y.backward(torch.randn(8, HIDDEN).bfloat16().to(device))
    assert all(weight.grad_added_to_main_grad for weight in pair)
    assert x.grad is not None
    return [weight.main_grad.cpu() for weight in pair], x.grad.cpu()


@torch.no_grad()
def _recomputed(way: str) -> list[Tensor]:
    """The same sums in fp64, from the bf16 operands that the GEMMs of both passes have."""
    w_in, w_out = _half_precision_weights()
    sums = [weight.main_grad.double() for weight in (w_in, w_out)]
    sizes = [5, 3] if way == "loop" else [4, 4]
    torch.manual_seed(3)
    for _ in range(2):
        x, dy = torch.randn(8, HIDDEN).bfloat16(), torch.randn(8, HIDDEN).bfloat16()
        for expert, (mine, grad) in enumerate(zip(x.split(sizes), dy.split(sizes), strict=True)):
            z = mine @ w_in[expert]
            dz, h = gated_silu.backward(grad @ w_out[expert].mT, z, 3)
            sums[0][expert] += mine.double().t() @ dz.double()
            sums[1][expert] += h.double().t() @ grad.double()
    return [total.detach() for total in sums]


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", ["loop", "batched"])
def test_bf16_products_are_added_to_an_fp32_main_grad_unrounded(way: str, device: str) -> None:
    """To fp32's precision at 1000, where numbers of bf16 are 4 apart."""
    if device == "emulated":
        with emulated_gpu(gradients=True):
            found, _ = _accumulated(way, "cuda")
    else:
        found, _ = _accumulated(way, device)
    # A GPU's own GEMMs may round the operands of these products elsewhere.
    within = 5e-5 if device == "cuda" else 3e-7
    for value, expected in zip(found, _recomputed(way), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=within, atol=0.0)


def test_a_second_derivative_is_an_error() -> None:
    w_in, w_out = weights(1, 2)
    x = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = expert_gemm.batched(x, w_in, w_out, [ExpertBucket(1, 2)], gated_silu)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
