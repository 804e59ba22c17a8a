"""FP8 results of operations, in every implementation that a CPU has."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kernels.fp8 import rules
from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.fp8.rules import E4M3, E5M2
from tests.fused_kernels.fp8.vectors import RECORDED, digest, operand

IMPLEMENTATIONS = ("reference", "native")


def module_of(implementation: str, operation: str) -> Any:
    return importlib.import_module(f"fused_kernels.{implementation}.{operation}")


def numbers(*shape: int) -> Tensor:
    """Of many magnitudes, with a row of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) ** 5
    x[-1] = 0.0
    return x


def equal(found: Fp8Rows, expected: Fp8Rows) -> bool:
    """All bytes."""
    pairs = [(found.values.view(torch.uint8), expected.values.view(torch.uint8))]
    pairs.append((found.factors, expected.factors))
    if expected.amax is not None:
        assert found.amax is not None
        pairs.append((found.amax, expected.amax))
    return all(torch.equal(a, b) for a, b in pairs)


def outputs(parts: int) -> list[Fp8Output]:
    """Every kind of scale; given ones of which some let values saturate."""
    given = torch.linspace(0.5, 300.0, parts)
    return [
        Fp8Output(dtype=E4M3, scaling="given", scale=given),
        Fp8Output(dtype=E5M2, scaling="given", scale=given),
        Fp8Output(dtype=E4M3, scaling="blockwise"),
        Fp8Output(dtype=E4M3, scaling="mxfp8"),
        Fp8Output(dtype=E5M2, scaling="mxfp8"),
    ]


def test_blocks_are_those_of_transformer_engines_reference() -> None:
    found = quantized(operand(), Fp8Output(dtype=E4M3, scaling="blockwise"))
    assert digest(found.values, found.factors) == RECORDED["blockwise 1 e4m3fn"]
    assert torch.equal(found.dequantized(), rules.dequantized(found.values, found.factors, 1, 128))


def test_given_scales_by_hand() -> None:
    """Two parts with scales 2 and 0.5: 3 * 2 = 6; 1000 * 0.5 saturates at 448, that is 896."""
    x = torch.tensor([[3.0, -1.0], [0.25, 0.0], [1000.0, 4.0], [0.0, 0.0]])
    scale = torch.tensor([2.0, 0.5])
    found = quantized(x, Fp8Output(dtype=E4M3, scaling="given", scale=scale))
    assert found.values.float().tolist() == [[6.0, -2.0], [0.5, 0.0], [448.0, 2.0], [0.0, 0.0]]
    assert found.factors.tolist() == [0.5, 2.0]
    assert found.amax is not None and found.amax.tolist() == [3.0, 1000.0]
    assert found.dequantized().tolist() == [[3.0, -1.0], [0.25, 0.0], [896.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("blocks", [2, 3])
def test_the_gate_writes_what_quantising_its_result_gives(implementation: str, blocks: int) -> None:
    gate = module_of(implementation, "gated_silu")
    z = numbers(12, blocks * 150).bfloat16()
    for output in outputs(4):
        expected = quantized(gate.forward(z, blocks), output)
        assert equal(gate.forward_fp8(z, blocks, output), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dispatch_writes_what_quantising_its_result_gives(implementation: str) -> None:
    dispatch = module_of(implementation, "dispatch_tokens")
    x, source = numbers(7, 150), torch.tensor([3, 0, -1, 6, 2, -1, -1, -1])
    for output in outputs(4):
        found = dispatch.forward_fp8(x, source, output)
        assert equal(found, quantized(dispatch.forward(x, source), output))
        assert not found.dequantized()[2].any()
        if found.amax is not None:
            assert found.amax[3] == 0.0


def test_a_scale_that_does_not_fit_is_rejected() -> None:
    x = torch.ones(4, 8)
    for scale in (None, torch.ones(3), torch.ones(())):
        with pytest.raises(ValueError, match=r"scale must be \[G\], with G a divisor of 4 rows"):
            quantized(x, Fp8Output(dtype=E4M3, scaling="given", scale=scale))
