"""`linear_cross_entropy` against fp64 autograd through all logits, values and gradients."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_kernels import registry, select
from tests.support.emulated_gpu import emulated_gpu
from tests.support.kernels import need

SCALE = 0.3
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 1e-5},
    # The gradient of the tokens is rounded to bf16; statistics and the weight's are not.
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
}
IMPLEMENTED = [
    name
    for name in registry.IMPLEMENTATIONS
    if "linear_cross_entropy" not in {op for n, op in registry.LEFT_TO_REFERENCE if n == name}
    and name in registry.known("linear_cross_entropy", "cpu")
]


@pytest.fixture(params=IMPLEMENTED)
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    """Each implementation that runs on a CPU."""
    need(request.param)
    return select("linear_cross_entropy", request.param).module


def operands(
    tokens: int, columns: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weight, targets of which every third is in another shard, and weights [2, T]."""
    generator = torch.Generator().manual_seed(columns)
    x_TH = (3 * torch.randn(tokens, hidden, generator=generator)).to(dtype)
    weight_VH = torch.randn(columns, hidden, generator=generator).to(dtype)
    target_T = torch.randint(0, columns, (tokens,), generator=generator)
    target_T[::3] = columns + 1 if tokens % 2 else -1
    weights_2T = torch.rand(2, tokens, dtype=torch.float64, generator=generator)
    weights_2T[:, 1::4] = 0.0
    return x_TH, weight_VH, target_T, weights_2T


def expected(
    x_TH: Tensor, weight_VH: Tensor, target_T: Tensor, weights_2T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [2, T], log Z, and gradients of their weighted sum, in fp64."""
    x, weight = (t.double().requires_grad_() for t in (x_TH, weight_VH))
    logits = SCALE * x @ weight.t()
    log_z = logits.logsumexp(-1)
    ours = (target_T >= 0) & (target_T < len(weight))
    picked = logits.gather(1, torch.where(ours, target_T, 0).unsqueeze(1)).squeeze(1)
    # A token whose target is in another shard: this shard's part of its loss is log Z.
    losses = torch.stack((log_z - picked * ours, log_z.square()))
    (losses * weights_2T).sum().backward()
    assert x.grad is not None and weight.grad is not None
    return losses.detach(), log_z.detach(), x.grad, weight.grad


def computed(
    kernel: ModuleType,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    chunk: int,
    before: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by the operation; the weight's gradient is added to ``before``."""
    x_TH, weight_VH, target_T, weights_2T = operands
    stats_3T, kept = kernel.forward(x_TH, weight_VH, target_T, SCALE, chunk)
    top_T, total_T, picked_T = stats_3T
    log_z_T = top_T + total_T.log()
    ours_T = (target_T >= 0) & (target_T < weight_VH.shape[0])
    assert (picked_T[~ours_T] == 0).all()
    losses = torch.stack((log_z_T - (picked_T + top_T) * ours_T, log_z_T.square()))
    weights = weights_2T.to(stats_3T.dtype)
    both_2T = torch.stack((weights[0] + 2 * log_z_T * weights[1], weights[0]))
    grad_VH = torch.full_like(weight_VH, before, dtype=stats_3T.dtype)
    grad_TH = kernel.backward(
        x_TH, weight_VH, target_T, SCALE, stats_3T, log_z_T, both_2T, kept, grad_VH
    )
    return losses, log_z_T, grad_TH, grad_VH


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 1000], ids="chunk {}".format)
@pytest.mark.parametrize("shape", [(13, 37, 24), (1, 1, 8), (8, 300, 16)], ids=str)
def test_equals_fp64_autograd(
    kernel: ModuleType, shape: tuple[int, int, int], chunk: int, dtype: torch.dtype
) -> None:
    given = operands(*shape, dtype)
    losses, log_z, grad_x, grad_weight = computed(kernel, given, chunk, before=0.5)
    wanted = expected(*given)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert (losses.dtype, grad_x.dtype, grad_weight.dtype) == (precise, dtype, precise)
    statistics = TOLERANCE[precise]
    torch.testing.assert_close(losses.double(), wanted[0], **statistics)
    torch.testing.assert_close(log_z.double(), wanted[1], **statistics)
    torch.testing.assert_close(grad_x.double(), wanted[2], **TOLERANCE[dtype])
    torch.testing.assert_close(grad_weight.double() - 0.5, wanted[3], **statistics)


def test_large_logits_neither_overflow_nor_cancel(kernel: ModuleType) -> None:
    """Logits of 1000 and more, of which exp is infinite; all equal: the loss is log V."""
    x_TH, weight_VH = torch.full((3, 4), 100.0), torch.full((16, 4), 10.0)
    target_T = torch.tensor([0, 7, 15])
    stats_3T, _ = kernel.forward(x_TH, weight_VH, target_T, 1.0, 2)
    assert stats_3T.tolist() == [[4000.0] * 3, [16.0] * 3, [0.0] * 3]


def test_no_tokens(kernel: ModuleType) -> None:
    given = operands(0, 5, 8, torch.float32)
    losses, _, grad_x, grad_weight = computed(kernel, given, 4, before=0.5)
    assert losses.shape == (2, 0)
    assert grad_x.shape == (0, 8)
    assert (grad_weight == 0.5).all()


def test_the_weight_s_gradient_can_be_left_out(kernel: ModuleType) -> None:
    x_TH, weight_VH, target_T, weights_2T = given = operands(6, 10, 8, torch.float32)
    stats_3T, kept = kernel.forward(x_TH, weight_VH, target_T, SCALE, 4)
    log_z_T = stats_3T[0] + stats_3T[1].log()
    both_2T = torch.stack((weights_2T[0] + 2 * log_z_T * weights_2T[1], weights_2T[0])).float()
    grad_TH = kernel.backward(
        x_TH, weight_VH, target_T, SCALE, stats_3T, log_z_T, both_2T, kept, None
    )
    torch.testing.assert_close(grad_TH.double(), expected(*given)[2], **TOLERANCE[torch.float32])


def largest_allocation(function: object) -> int:
    """Elements of the largest tensor that a call makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple) else (out,):
                if isinstance(each, Tensor):
                    self.most = max(self.most, each.untyped_storage().nbytes() // 4)
            return out

    with Largest() as seen:
        function()  # type: ignore[operator]
    return seen.most


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    """64 tokens in chunks of 16, with so many columns that nothing else is larger than 16 of them.

    The reference alone: others may keep less.
    """
    kernel = select("linear_cross_entropy", "reference").module
    given = operands(64, 4096, 8, torch.float32)
    assert largest_allocation(lambda: computed(kernel, given, 16)) == max(16 * 4096, 4096 * 8)


@pytest.mark.parametrize("device", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", [4, 100])
def test_bf16_operands_of_a_gpu_are_multiplied_as_they_are(device: str, chunk: int) -> None:
    """No fp32 copy of the weight, and gradients that differ by one rounding of dz to bf16."""
    from contextlib import nullcontext

    kernel = select("linear_cross_entropy", "reference", "cuda").module
    given = operands(12, 96, 32, torch.bfloat16)
    wanted = expected(*given)
    with emulated_gpu() if device == "emulated" else nullcontext():
        there = tuple(each.to("cuda") for each in given)
        losses, _, grad_x, grad_weight = (each.cpu() for each in computed(kernel, there, chunk))
    torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-5, atol=1e-5)
    assert grad_weight.dtype == torch.float32
    for found, exact in ((grad_x, wanted[2]), (grad_weight, wanted[3])):
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 2**-8, error
