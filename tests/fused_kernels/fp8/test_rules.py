"""Bytes of FP8 operands against Transformer Engine's and torchao's references."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fused_kernels.fp8 import rules
from fused_kernels.fp8.rules import E4M3, E5M2
from tests.fused_kernels.fp8.vectors import RECORDED, digest, operand

TYPES = {"e4m3fn": E4M3, "e5m2": E5M2}
RULES: dict[str, Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]] = {
    "tensorwise": rules.per_tensor,
    "blockwise 1": rules.per_block,
    "blockwise 128": lambda x, dtype: rules.per_block(x, dtype, 128),
}


@pytest.mark.parametrize("key", RECORDED)
def test_bytes_are_those_of_transformer_engines_references(key: str) -> None:
    rule, _, dtype = key.rpartition(" ")
    assert digest(*RULES[rule](operand(), TYPES[dtype])) == RECORDED[key]


@pytest.mark.parametrize("dtype", TYPES.values())
def test_bytes_of_mxfp8_are_those_of_torchao(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = operand()
    values, exponents = rules.mxfp8(x, dtype)
    expected_exponents, expected = to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL)
    assert torch.equal(exponents, expected_exponents.view(torch.uint8))
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", TYPES)
def test_every_finite_bf16_number_is_rounded_as_in_ml_dtypes(name: str) -> None:
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()].float()
    most = torch.finfo(TYPES[name]).max
    expected = x.clamp(-most, most).numpy().astype(getattr(ml_dtypes, f"float8_{name}"))
    found = rules.round_to(x, TYPES[name]).view(torch.uint8)
    assert np.array_equal(found.numpy(), expected.view(np.uint8))
    assert rules.round_to(torch.tensor([1e9, -1e9]), TYPES[name]).float().tolist() == [most, -most]
    assert rules.round_to(torch.tensor(torch.nan), TYPES[name]).float().isnan()


def test_scales_by_hand() -> None:
    """448 / 7 = 64; 448 / 300 = 1.49, of which 1 is the power of two below."""
    x = torch.tensor([[7.0, -3.0], [300.0, 1.0]])
    for_each = rules.scale_of(x.abs().amax(1), E4M3, torch.float32)
    assert for_each.tolist() == [64.0, torch.tensor(448.0).div(300.0).item()]
    powers = rules.scale_of(x.abs().amax(1), E4M3, torch.float32, power_of_two=True)
    assert powers.tolist() == [64.0, 1.0]
    odd = torch.tensor([0.0, torch.inf, torch.nan, 1e-45])
    assert rules.scale_of(odd, E4M3, torch.float32).tolist()[:3] == [1.0, 1.0, 1.0]
    largest = torch.finfo(torch.bfloat16).max
    assert rules.scale_of(odd, E4M3, torch.bfloat16)[3].item() == largest


def test_exponents_of_mxfp8_by_hand() -> None:
    """2^e is not below amax / 448: 448 -> 1 = 2^0 (127); 449 -> 2^1; 224 -> 2^-1; 0 -> 2^-127."""
    x = torch.zeros(4, 32)
    x[0, 3], x[1, 3], x[2, 3] = 448.0, 449.0, -224.0
    values, exponents = rules.mxfp8(x, E4M3)
    assert exponents.flatten().tolist() == [127, 128, 126, 0]
    assert values[:, 3].float().tolist() == [448.0, 224.0, -448.0, 0.0]


@pytest.mark.parametrize("rule", ["mxfp8", "blockwise"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 130, 129), (2, 0, 64), (1, 1)])
def test_blocks_that_are_not_full_are_those_of_zeros(rule: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for rows in (1,) if rule == "mxfp8" else (1, 128):
        block = 32 if rule == "mxfp8" else 128

        def rounded(x: Tensor, rows: int = rows, block: int = block) -> Tensor:
            found = rules.mxfp8(x, E4M3) if rule == "mxfp8" else rules.per_block(x, E4M3, rows)
            return rules.dequantized(*found, rows=rows, block=block)

        wide = torch.nn.functional.pad(x, (0, 256 - x.shape[-1], 0, 256 - x.shape[-2]))
        expected = rounded(wide)[..., : x.shape[-2], : x.shape[-1]]
        assert torch.equal(rounded(x), expected)
        assert not x.numel() or not torch.equal(rounded(x), x)


@pytest.mark.parametrize("dtype", TYPES.values())
def test_what_comes_back_is_within_half_a_step(dtype: torch.dtype) -> None:
    """Relative 2^-4 (3 bits of mantissa) or 2^-3 (2 bits) of numbers above the subnormal ones."""
    x = operand().float()
    for found, shape in (
        (rules.per_tensor(x, dtype), {}),
        (rules.per_block(x, dtype, 128), {"rows": 128, "block": 128}),
        (rules.per_block(x, dtype), {"block": 128}),
        (rules.mxfp8(x, dtype), {"block": 32}),
    ):
        back = rules.dequantized(*found, **shape)
        normal = found[0].float().abs() > torch.finfo(dtype).smallest_normal
        assert normal.sum() > 60000
        error = ((back - x).abs() / x.abs())[normal].max()
        assert error <= (2.0**-4 if dtype == E4M3 else 2.0**-3)
