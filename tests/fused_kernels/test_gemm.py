"""Products with a result in fp32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fused_kernels.gemm import gemm, operand, result_dtype
from tests.support.emulated_gpu import emulated_gpu

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_is_beta_out_plus_alpha_left_right(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 5, generator=generator).to(dtype) for _ in range(2))
    out = torch.randn(3, 3, generator=generator).to(result_dtype(dtype))
    exact = 0.5 * out.double() + 2 * left.double() @ right.double().t()
    found = gemm(out, operand(left), operand(right).t(), alpha=2.0, beta=0.5)
    assert found is out
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_without_beta_the_result_s_memory_is_not_read() -> None:
    one = torch.ones(2, 2)
    assert (gemm(torch.full((2, 2), torch.nan), one, one) == 2).all()


def test_a_cpu_multiplies_16_bits_in_fp32() -> None:
    assert operand(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert operand(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_a_gpu_multiplies_16_bits_without_a_copy_into_fp32(device: str) -> None:
    """1 + 2^-8 squared needs 17 bits: bf16 has 8, so the result is not rounded to it."""
    with emulated_gpu() if device == "emulated" else nullcontext():
        left = torch.full((4, 4), 1 + 2**-7).bfloat16().to("cuda")
        assert operand(left) is left
        wide = left.float()
        assert operand(wide) is wide
        out = torch.zeros(4, 4).to("cuda")
        gemm(out, left, left.t(), alpha=0.5)
        assert (out.cpu() == 2 * (1 + 2**-7) ** 2).all()
