"""FP8 results of Triton kernels.

Scales, factors and largest magnitudes are exact in the interpreter, and are compared bit for bit.
Its conversion to FP8 is not: it drops the carry of a mantissa that rounds up to the next power of
two, and numbers below the smallest normal one. So values are compared where neither happens; all
bytes on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.fp8.rules import E4M3, E5M2
from fused_kernels.triton import dispatch_tokens, gated_silu
from fused_kernels.triton import fp8 as triton_fp8


def outputs(device: torch.device) -> dict[str, Fp8Output]:
    """Every kind of scale."""
    given = torch.tensor([0.7, 300.0], device=device)
    return {
        "given e4m3": Fp8Output(dtype=E4M3, scaling="given", scale=given),
        "given e5m2": Fp8Output(dtype=E5M2, scaling="given", scale=given),
        "blockwise e4m3": Fp8Output(dtype=E4M3, scaling="blockwise"),
        "blockwise e5m2": Fp8Output(dtype=E5M2, scaling="blockwise"),
        "mxfp8 e4m3": Fp8Output(dtype=E4M3, scaling="mxfp8"),
        "mxfp8 e5m2": Fp8Output(dtype=E5M2, scaling="mxfp8"),
    }


NAMES = tuple(outputs(torch.device("cpu")))


def numbers(*shape: int) -> Tensor:
    """Of many magnitudes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) ** 3


def scales_equal(found: Fp8Rows, expected: Fp8Rows) -> None:
    """Bit for bit; NaN equals NaN."""
    assert found.factors.dtype == expected.factors.dtype
    torch.testing.assert_close(found.factors, expected.factors, rtol=0, atol=0, equal_nan=True)
    assert (found.amax is None) == (expected.amax is None)
    if found.amax is not None and expected.amax is not None:
        torch.testing.assert_close(found.amax, expected.amax, rtol=0, atol=0, equal_nan=True)


def values_equal(found: Fp8Rows, expected: Fp8Rows) -> None:
    """All bytes on a GPU; in the interpreter those of normal numbers but powers of two."""
    mine, other = found.values, expected.values
    if mine.is_cuda:
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
        return
    wide = other.float()
    compared = wide.abs() >= torch.finfo(other.dtype).smallest_normal
    compared &= torch.frexp(wide).mantissa.abs() != 0.5
    assert compared.sum() >= 0.4 * wide.count_nonzero() or wide.count_nonzero() < 50
    assert torch.equal(mine.float()[compared], wide[compared])
    assert not mine.float()[wide == 0.0].abs().gt(torch.finfo(other.dtype).smallest_normal).any()


@pytest.mark.parametrize("hidden", [1, 33, 300, 2100])
@pytest.mark.parametrize("name", NAMES)
def test_dispatch(device: torch.device, name: str, hidden: int) -> None:
    """Rows of no token have the scale of zeros. Of two given scales each has a token."""
    x = numbers(5, hidden).to(device)
    source = torch.tensor([3, -1, 0, 4, -1, -1, 2, 1, -1, -1, -1, 0], device=device)
    output = outputs(device)[name]
    found = dispatch_tokens.forward_fp8(x, source, output)
    plain = dispatch_tokens.forward(x, source)
    expected = quantized(plain, output)
    scales_equal(found, expected)
    values_equal(found, expected)
    assert not found.values[1].float().any()


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("width", [1, 40, 300, 2100])
@pytest.mark.parametrize("name", NAMES)
def test_gate(device: torch.device, name: str, width: int, blocks: int) -> None:
    z = numbers(4, blocks * width).to(device)
    output = outputs(device)[name]
    found = gated_silu.forward_fp8(z, blocks, output)
    plain = gated_silu.forward(z, blocks)
    expected = quantized(plain, output)
    scales_equal(found, expected)
    values_equal(found, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_scales_of_odd_numbers(device: torch.device, name: str) -> None:
    """Zeros, NaN, infinity, the largest, subnormal numbers, and both sides of powers of two."""
    odd = [0.0, torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-38, 1e-42, 448.0, 449.0, 224.0]
    odd += [225.0, 57344.0, 57345.0, 7.0, 2.0**-130, 448 * 2.0**-127, 448.01 * 2.0**-127]
    x = torch.zeros(2 * len(odd), 130)
    x[::2, 3] = torch.tensor(odd)
    x[1::2, 129] = torch.tensor(odd)
    x = x.to(device)
    source = torch.arange(len(x), device=device)
    output = outputs(device)[name]
    scales_equal(dispatch_tokens.forward_fp8(x, source, output), quantized(x, output))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(device: torch.device, name: str) -> None:
    none = torch.zeros(0, dtype=torch.long, device=device)
    output, x = outputs(device)[name], torch.zeros(3, 40, device=device)
    expected = quantized(x[:0], output)
    scales_equal(dispatch_tokens.forward_fp8(x, none, output), expected)
    scales_equal(gated_silu.forward_fp8(x.new_zeros(0, 80), 2, output), expected)


def test_what_does_not_fit_is_rejected(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, source = torch.zeros(4, 8, device=device), torch.zeros(3, dtype=torch.long, device=device)
    given = outputs(device)["given e4m3"]
    with pytest.raises(ValueError, match="G a divisor of 3 rows"):
        dispatch_tokens.forward_fp8(x, source, given)
    with pytest.raises(ValueError, match="expected 2 or 3"):
        gated_silu.forward_fp8(x, 4, given)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    words = r"needs compute capability 8\.9 \(found 8\.0\); use the reference kernels"
    with pytest.raises(ValueError, match=words):
        triton_fp8.check_device("gated_silu", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_all_bytes_of_bfloat16(name: str) -> None:
    device = torch.device("cuda")
    output, z = outputs(device)[name], numbers(64, 3 * 520).to(device).bfloat16()
    expected = quantized(gated_silu.forward(z, 3), output)
    found = gated_silu.forward_fp8(z, 3, output)
    scales_equal(found, expected)
    values_equal(found, expected)
