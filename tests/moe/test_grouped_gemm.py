"""Experts by grouped GEMMs: against automatic differentiation, the loop, and PyTorch's function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_kernels.reference import gated_silu, rank_in_expert
from megatron_moe.errors import UsageError
from megatron_moe.moe import grouped_gemm
from megatron_moe.moe.grouped_gemm import SortedRows, check_device, grouped
from tests.moe.cases import BATCH, SEQUENCE, layer_of, moe_config, reference_of, tokens
from tests.moe.test_expert_gemm import plain, weights
from tests.support.emulated_gpu import HostReads, emulated_gpu

SIZES = {
    "uneven": [3, 1, 4, 2],
    "empty experts": [0, 3, 0, 4],
    "all to one": [0, 0, 9, 0],
    "nothing": [0, 0, 0, 0],
}


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_automatic_differentiation(sizes: list[int], blocks: int) -> None:
    """Two rows past the end hold NaN: they must reach nothing."""
    w_in, w_out = weights(4, blocks)
    filled = sum(sizes)
    x = torch.randn(filled + 2, w_in.shape[1], dtype=torch.float64)
    x[filled:] = torch.nan
    x.requires_grad_()
    y = grouped(x, w_in, w_out, ends_of(sizes), gated_silu)[:filled]
    each = zip(x[:filled].split(sizes), w_in, w_out, strict=True)
    expected = torch.cat([plain(*one) for one in each])
    torch.testing.assert_close(y, expected)
    grad, leaves = torch.randn_like(y), (x, w_in, w_out)
    ours = torch.autograd.grad(y, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for found, want in zip(
        (ours[0][:filled], *ours[1:]), (theirs[0][:filled], *theirs[1:]), strict=True
    ):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorchs_function_computes_the_same(dtype: torch.dtype) -> None:
    """What runs on a GPU, on this CPU: products both ways round, with an empty expert."""
    torch.manual_seed(1)
    x, dy = torch.randn(10, 16).to(dtype), torch.randn(10, 24).to(dtype)
    weight, ends = torch.randn(3, 16, 24).to(dtype), ends_of([4, 0, 5])
    within = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for left, right, ours in (
        (x, weight, grouped_gemm.product(x, weight, ends)),
        (dy, weight.mT, grouped_gemm.product(dy, weight.mT, ends)),
    ):
        theirs = F.grouped_mm(left, right, offs=ends)
        torch.testing.assert_close(ours[:9], theirs[:9], **within)
    theirs = F.grouped_mm(x.mT, dy, offs=ends)
    torch.testing.assert_close(grouped_gemm.product_over_rows(x, dy, ends), theirs, **within)
    assert theirs[1].abs().max() == 0


def test_rows_of_two_sources_are_sorted() -> None:
    """The example of `SortedRows`, worked by hand."""
    order = SortedRows.of(torch.tensor([[2, 1], [1, 1]]), 4, rank_in_expert)
    assert order.arrived_R.tolist() == [0, 1, 4, 2, 5, 3, 6, 7]
    assert order.ends_E.tolist() == [3, 5]
    x = torch.arange(8.0, dtype=torch.float64)[:, None].requires_grad_()
    sorted_x = order.sort(x)
    assert sorted_x.flatten().tolist() == [0, 1, 4, 2, 5, 3, 6, 7]
    torch.testing.assert_close(order.unsort(sorted_x), x)
    assert torch.autograd.gradcheck(order.sort, (x,))


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_a_layer_equals_the_reference(capacity: float | None) -> None:
    layer = layer_of(moe_config(moe_expert_impl="grouped", moe_expert_capacity_factor=capacity))
    x = tokens(1).requires_grad_()
    expected, _ = reference_of(layer)(x.transpose(0, 1), True)
    torch.testing.assert_close(layer(x), expected.transpose(0, 1))
    grad = tokens(2)
    loop = layer_of(moe_config(moe_expert_impl="loop", moe_expert_capacity_factor=capacity))
    leaves = (x, *layer.experts.parameters())
    ours = torch.autograd.grad(layer(x), leaves, grad)
    same = torch.autograd.grad(loop(x), (x, *loop.experts.parameters()), grad)
    torch.testing.assert_close(ours, same)


def test_buffers_without_a_capacity_have_no_row_too_many() -> None:
    """One rank: T K rows, where the fixed layout has T E."""
    rows = {}
    for impl in ("grouped", "batched"):
        layer = layer_of(moe_config(moe_expert_impl=impl, moe_expert_capacity_factor=None))
        x = tokens(1)
        scores, _ = layer.router(x.flatten(0, 1))
        rows[impl] = layer.dispatcher.plan(scores, BATCH, True, layer.experts).schedule.layout.rows
    assert rows == {"grouped": SEQUENCE * BATCH * 2, "batched": SEQUENCE * BATCH * 4}


def test_main_grad_gets_the_sum_of_micro_batches() -> None:
    w_in, w_out = (nn.Parameter(w.detach().float()) for w in weights(2, 3))
    expected = [torch.ones_like(w) for w in (w_in, w_out)]
    ends = ends_of([3, 2])
    for weight in (w_in, w_out):
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    for seed in range(2):
        torch.manual_seed(seed)
        x, grad = torch.randn(2, 5, w_in.shape[1]).unbind()
        copies = [w.detach().clone().requires_grad_() for w in (w_in, w_out)]
        plain_grads = torch.autograd.grad(
            torch.cat([plain(*one) for one in zip(x.split([3, 2]), *copies, strict=True)]),
            copies, grad,
        )  # fmt: skip
        expected = [total + g for total, g in zip(expected, plain_grads, strict=True)]
        grouped(x, w_in, w_out, ends, gated_silu).backward(grad)
    for weight, total in zip((w_in, w_out), expected, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, total)


def test_nothing_is_read_on_a_gpu() -> None:
    """On the emulated device, with PyTorch's own function; results are the CPU's."""
    torch.manual_seed(0)
    x, sizes = torch.randn(9, 16), [4, 0, 3]
    w_in, w_out = torch.randn(3, 16, 2 * 8), torch.randn(3, 8, 16)
    expected = grouped(x, w_in, w_out, ends_of(sizes), gated_silu)
    with emulated_gpu(gradients=True):
        there = [t.to("cuda").requires_grad_() for t in (x, w_in, w_out)]
        with HostReads():
            ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
            y = grouped(*there, ends, gated_silu)
            y.backward(torch.ones(9, 16, device="cuda"))
        torch.testing.assert_close(y.cpu()[:7], expected[:7])


def test_what_a_gpu_has_no_grouped_gemm_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    check_device(torch.device("cpu"), torch.float32, 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(gpu, torch.bfloat16, 8, 24)
    with pytest.raises(UsageError, match=r"multiples of 8 \(got 'grouped with a width of 12'\)"):
        check_device(gpu, torch.bfloat16, 8, 12)
    with pytest.raises(UsageError, match=r"--bf16 .* \(got 'grouped with float32 on 9.0'\)"):
        check_device(gpu, torch.float32, 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match=r"capability 9\.0 or 10\.0"):
        check_device(gpu, torch.bfloat16, 8)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_and_reads_nothing() -> None:
    torch.manual_seed(0)
    sizes, width = [40, 0, 77], 64
    x, grad = (torch.randn(128, width).bfloat16().cuda() for _ in range(2))
    w_in, w_out = torch.randn(3, width, 2 * 32) / 8, torch.randn(3, 32, width) / 6
    here = [w.bfloat16().double().requires_grad_() for w in (w_in, w_out)]
    there = [w.bfloat16().cuda().requires_grad_() for w in (w_in, w_out)]
    ends = ends_of(sizes).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = grouped(x, *there, ends, gated_silu)
        grads = torch.autograd.grad(y, there, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = x[: sum(sizes)].cpu().double().split(sizes)
    parts = [
        (F.silu(r @ w[:, :32]) * (r @ w[:, 32:])) @ o for r, w, o in zip(rows, *here, strict=True)
    ]
    expected = torch.cat(parts)
    wanted = torch.autograd.grad(expected, here, grad[: sum(sizes)].cpu().double())
    for found, want in zip((y[: sum(sizes)], *grads), (expected, *wanted), strict=True):
        error = (found.cpu().double() - want).norm() / want.norm()
        assert error < 0.02
