"""A GEMM with operands in FP8 and its gradients, against torchao, torch's FP8 GEMM and loops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kernels.fp8 import rules
from fused_kernels.fp8.gemm import DelayedScale, Fp8Gemm, Fp8Settings
from fused_kernels.fp8.rules import E4M3, E5M2

ROWS, INPUTS, OUTPUTS, EXPERTS = 128, 64, 96, 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """With outliers, so that scales matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) ** 3


def gradients(function: Any, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_tensorwise_is_torchaos_float8_linear() -> None:
    """Its default: e4m3, gradients in e5m2. All three GEMMs, and several dimensions of rows."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    plain = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    x, dy = numbers(4, ROWS // 4, INPUTS), numbers(4, ROWS // 4, OUTPUTS, seed=1)
    weight = plain.weight.detach().clone()
    theirs = Float8Linear.from_float(plain, config=Float8LinearConfig(emulate=True))

    def by_torchao(x: Tensor, weight: Tensor) -> Tensor:
        theirs.weight = weight
        return theirs(x)

    weight = torch.nn.Parameter(weight)
    x1 = x.clone().requires_grad_()
    y = by_torchao(x1, weight)
    y.backward(dy)
    gemm = Fp8Gemm(Fp8Settings(recipe="tensorwise", hybrid=True))
    found = gradients(gemm, x, weight.detach(), dy)
    close(found, [y.detach(), x1.grad, weight.grad])  # type: ignore[list-item]
    e4m3 = gradients(Fp8Gemm(Fp8Settings(recipe="tensorwise")), x, weight.detach(), dy)
    assert torch.equal(e4m3[0], found[0]) and not torch.equal(e4m3[1], found[1])


def test_mxfp8_is_torchaos_grouped_gemm() -> None:
    from torchao.prototype.moe_training import mxfp8_grouped_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common import KernelPreference

    x, weight = numbers(EXPERTS, ROWS, INPUTS), numbers(EXPERTS, OUTPUTS, INPUTS, seed=1)
    dy = numbers(EXPERTS, ROWS, OUTPUTS, seed=2).bfloat16()
    x, weight = x.bfloat16(), weight.bfloat16()
    ends = torch.arange(ROWS, EXPERTS * ROWS + 1, ROWS, dtype=torch.int32)

    def by_torchao(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = mxfp8_grouped_mm._to_mxfp8_then_scaled_grouped_mm(
            x.flatten(0, 1),
            weight.transpose(-2, -1),
            ends,
            kernel_preference=KernelPreference.EMULATED,
            scale_calculation_mode=ScaleCalculationMode.RCEIL,
        )
        return y.unflatten(0, (EXPERTS, ROWS))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gradients(by_torchao, x, weight, dy)
    found = gradients(Fp8Gemm(Fp8Settings(recipe="mxfp8"), EXPERTS), x, weight, dy)
    # Both round sums to bf16, of products that are exact in fp32.
    close(found, expected, 2.0**-8)
    exact = gradients(lambda x, w: x @ w.mT, x, weight, dy)
    assert all(
        (a - b).abs().max() > 2.0**-5 * b.abs().max() for a, b in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("hybrid", [False, True])
def test_one_scale_a_tensor_is_the_gemm_of_fp8_tensors(hybrid: bool) -> None:
    """Torch's own FP8 GEMM, of bytes and scales; on a CPU it takes e4m3 only."""
    x, weight = numbers(ROWS, INPUTS), numbers(OUTPUTS, INPUTS, seed=1)
    (a, scale_a), (b, scale_b) = rules.per_tensor(x, E4M3), rules.per_tensor(weight, E4M3)
    scales = {"scale_a": scale_a.view(()), "scale_b": scale_b.view(())}
    expected = torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.float32)
    found = Fp8Gemm(Fp8Settings(recipe="tensorwise", hybrid=hybrid))(x, weight)
    close([found], [expected])


def block_sums(a: Tensor, b: Tensor, rows_b: int) -> Tensor:
    """A b^T in fp64, block by block: integers in FP8 times the scales of their blocks."""
    (qa, sa), (qb, sb) = rules.per_block(a, E4M3), rules.per_block(b, E4M3, rows_b)
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    for k in range(0, a.shape[1], 128):
        part = qa[:, k : k + 128].double() @ qb[:, k : k + 128].double().t()
        scale_b = sb[:, k // 128].repeat_interleave(rows_b)[: b.shape[0]]
        out += part * sa[:, k // 128, None].double() * scale_b.double()
    return out


def test_blockwise_is_a_sum_over_blocks() -> None:
    """1 x 128 along the sum for activations and gradients, 128 x 128 for weights."""
    x, weight, dy = numbers(200, 300), numbers(260, 300, seed=1), numbers(200, 260, seed=2)
    found = gradients(Fp8Gemm(Fp8Settings(recipe="blockwise")), x, weight, dy)
    expected = [
        block_sums(x, weight, 128),
        block_sums(dy, weight.t().contiguous(), 128),
        block_sums(dy.t().contiguous(), x.t().contiguous(), 1),
    ]
    close(found, [e.float() for e in expected])


def test_each_expert_is_a_gemm_of_its_own() -> None:
    x, weight = numbers(EXPERTS, ROWS, INPUTS), numbers(EXPERTS, OUTPUTS, INPUTS, seed=1)
    x[1] *= 100.0
    dy = numbers(EXPERTS, ROWS, OUTPUTS, seed=2)
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        settings = Fp8Settings(recipe=recipe, hybrid=True)  # type: ignore[arg-type]
        together = gradients(Fp8Gemm(settings, EXPERTS), x, weight, dy)
        for expert in range(EXPERTS):
            parts = [t[expert] for t in (x, weight, dy)]
            alone = gradients(Fp8Gemm(settings), *parts)
            close([t[expert] for t in together], alone)


def test_delayed_scales_by_hand() -> None:
    """Steps of amax 300, 3000, 0 and inf: the next scale is 448 / amax, or stays."""
    scale = DelayedScale(Fp8Settings(recipe="delayed"), E4M3, None, None)
    seen = []
    for amax in (300.0, 3000.0, 0.0, torch.inf):
        scale.record(torch.tensor([[0.0, -amax]]))
        scale.record(torch.tensor([[amax / 2]]))
        scale.update()
        seen.append(scale.scale.item())
    by_hand = [torch.tensor(448.0).div(amax).item() for amax in (300.0, 3000.0)]
    assert seen == [*by_hand, by_hand[1], by_hand[1]]
    assert scale.amax_history.tolist() == [0.0]


def test_delayed_history_keeps_the_largest() -> None:
    """Of 3 rows, one is the step in progress: a large step counts for 3 updates."""
    settings = Fp8Settings(recipe="delayed", history=3, most_recent=False, margin=1)
    scale = DelayedScale(settings, E5M2, 2, None)
    seen = []
    for amax in (8.0, 4.0, 2.0, 1.0):
        scale.record(torch.tensor([[[amax]], [[1.0]]]))
        scale.update()
        seen.append(scale.scale.tolist())
    assert seen == [[57344.0 / amax / 2, 57344.0 / 2] for amax in (8.0, 8.0, 8.0, 4.0)]


def test_delayed_uses_the_scale_of_the_step_before_and_saturates() -> None:
    gemm = Fp8Gemm(Fp8Settings(recipe="delayed"))
    one = torch.eye(16)
    x = torch.full((16, 16), 2.0)
    for operand in gemm.scales.values():
        operand.record(x)
        operand.update()
    assert torch.equal(gemm(x, one), x)  # scale 224 of both
    grown = torch.full((16, 16), 50.0)
    assert torch.equal(gemm(grown, one), x)  # beyond 448 / 224
    gemm.scales["input"].update()
    assert gemm.scales["input"].scale.item() == torch.tensor(448.0).div(50.0).item()
    gemm.eval()
    gemm(grown * 2, one)
    assert gemm.scales["input"].amax_history.tolist() == [0.0]


def test_delayed_scales_do_not_depend_on_the_number_of_replicas() -> None:
    """Each of 4 replicas has 4 times the gradients: the same scales and bytes, 4 times the sums."""
    x, weight, dy = numbers(32, 16), numbers(32, 16, seed=1), numbers(32, 32, seed=2)
    found = []
    for replicas in (1, 4):
        gemm = Fp8Gemm(Fp8Settings(recipe="delayed", hybrid=True, replicas=replicas))
        for _ in range(2):
            _, dx, dw = gradients(gemm, x, weight, dy * replicas)
            for scale in gemm.scales.values():
                scale.update()
        found.append((dx / replicas, dw / replicas, gemm.scales["gradient"].scale))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_operands(dtype: torch.dtype) -> None:
    x, weight = numbers(32, 32).to(dtype), numbers(32, 32, seed=1).to(dtype)
    wide = gradients(Fp8Gemm(Fp8Settings(recipe="mxfp8")), x.double(), weight.double(), x.double())
    found = gradients(Fp8Gemm(Fp8Settings(recipe="mxfp8")), x, weight, x)
    assert {t.dtype for t in found} == {dtype}
    close([t.double() for t in found], wide, 2.0**-8 if dtype == torch.bfloat16 else 1e-12)


def test_nothing_to_multiply() -> None:
    """An expert without rows, or a micro-batch without any."""
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        gemm = Fp8Gemm(Fp8Settings(recipe=recipe), 2)  # type: ignore[arg-type]
        x, weight = torch.zeros(2, 0, 32), numbers(2, 16, 32)
        y, dx, dw = gradients(gemm, x, weight, torch.zeros(2, 0, 16))
        assert y.shape == (2, 0, 16) and dx.shape == x.shape and not dw.any()
