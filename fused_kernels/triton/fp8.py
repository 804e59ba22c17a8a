"""Quantisation of a block of values within a kernel, as `fused_kernels.fp8.rules` defines it.

Conversion to FP8 is the device's own instruction (compute capability 8.9 and newer for e4m3). All
that decides a scale is exact: largest magnitudes are compared as bit patterns, under which NaN is
larger than infinity, divisions are rounded to nearest, and powers of two are made of bits.

Shapes: BLOCK values, of which each PER, a divisor, share a scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows
from fused_kernels.triton.launch import cdiv

LEAST_CAPABILITY = (8, 9)
"""Of devices that convert to e4m3."""


@triton.jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """Bits of |x|, fp32, which are ordered as the values are."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def converted(x: tl.tensor, MOST: tl.constexpr, TYPE: tl.constexpr) -> tl.tensor:
    """FP8 values, to nearest even; beyond the range the largest one, and NaN stays."""
    x = tl.minimum(x, MOST, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -MOST, propagate_nan=tl.PropagateNan.ALL).to(TYPE)


@triton.jit
def block_scales(
    amax: tl.tensor,
    MX: tl.constexpr,
    MOST: tl.constexpr,
    INVERSE: tl.constexpr,
    LIMIT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """From bits of largest magnitudes: what values are multiplied by, and bits of the factor that
    brings them back; of MX, its biased exponent.
    """
    if MX:
        quotient = amax.to(tl.float32, bitcast=True) * INVERSE
        bits = quotient.to(tl.int32, bitcast=True)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        above = (mantissa > 0) & ((exponent > 0) | (mantissa > 0x400000))
        exponent = tl.minimum(exponent + above.to(tl.int32), 254)
        exponent = tl.where(amax > 0x7F800000, 255, exponent)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        return tl.where(exponent == 0, 1.0, scale), exponent
    usable = (amax > 0) & (amax < 0x7F800000)
    divisor = tl.where(usable, amax, 127 << 23).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, MOST, tl.float32), divisor)
    scale = tl.where(magnitude(scale) == 0x7F800000, LIMIT, scale)
    bits = scale.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(usable, bits, 127 << 23)
    # 2^-127 is subnormal.
    back = tl.where(bits == 254 << 23, 0x400000, (254 << 23) - bits)
    return bits.to(tl.float32, bitcast=True), back


@triton.jit
def store_blocks(
    x: tl.tensor,
    values: tl.tensor,
    factors: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    PER: tl.constexpr,
    MOST: tl.constexpr,
    INVERSE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantise and store columns ``start`` to ``start + BLOCK`` of a row, zero past ``width``.

    ``factors`` is fp32, or uint8 for MX.
    """
    MX: tl.constexpr = PER == 32
    COUNT: tl.constexpr = BLOCK // PER
    x = tl.reshape(x, (COUNT, PER))
    scale, back = block_scales(tl.max(magnitude(x), 1), MX, MOST, INVERSE, LIMIT)
    found = converted(x * scale[:, None], MOST, values.dtype.element_ty)
    column = start + tl.arange(0, BLOCK)
    tl.store(values + row * width + column, tl.reshape(found, (BLOCK,)), mask=column < width)
    number = tl.cdiv(width, PER)
    place = start // PER + tl.arange(0, COUNT)
    if MX:
        back = back.to(tl.uint8)
    else:
        back = back.to(tl.float32, bitcast=True)
    tl.store(factors + row * number + place, back, mask=place < number)


def check_device(name: str, device: torch.device) -> None:
    """Check that kernels can convert to FP8 there.

    Raises:
        ValueError: the device has no such instruction.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least, own = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, found))
        raise ValueError(
            f"{name}: an FP8 result needs compute capability {least} (found {own});"
            " use the reference kernels"
        )


def constants_of(output: Fp8Output, source: torch.dtype) -> dict[str, Any]:
    """What a kernel that quantises is compiled for.

    Args:
        output: the FP8 result.
        source: dtype of the values; its largest number replaces a scale that overflows.
    """
    most = torch.tensor(torch.finfo(output.dtype).max)
    limit = torch.finfo(source if source.itemsize < 4 else torch.float32).max
    return {
        "PER": output.block,
        "MOST": most.item(),
        "INVERSE": most.reciprocal().item(),
        "LIMIT": limit,
    }


def empty_rows(output: Fp8Output, like: Tensor, rows: int, width: int, parts: int) -> Fp8Rows:
    """Room for a result; with `given`, for the largest magnitude of each program.

    Args:
        output: the FP8 result.
        like: on the device of the operands.
        rows: R.
        width: F.
        parts: programs of a row.
    """
    values = like.new_empty(rows, width, dtype=output.dtype)
    if output.scaling == "given":
        factors = output.parts(rows).reciprocal()
        bits = like.new_empty(rows * parts, dtype=torch.int32)
        return Fp8Rows(values=values, factors=factors, amax=bits)
    dtype = torch.uint8 if output.scaling == "mxfp8" else torch.float32
    factors = like.new_empty(rows, cdiv(width, output.block), dtype=dtype)
    return Fp8Rows(values=values, factors=factors)


def scale_arguments(output: Fp8Output, result: Fp8Rows) -> dict[str, Tensor | int]:
    """What a kernel reads and writes scales by: `factors`, `amax` and `part_rows`.

    Args:
        output: the FP8 result.
        result: its room, from `empty_rows`.
    """
    factors, part_rows = result.factors, 1
    if output.scale is not None:
        factors = output.scale.contiguous()
        part_rows = result.values.shape[0] // max(1, factors.numel())
    # With blocks no largest magnitude is written, but the kernel has the argument.
    amax = result.factors if result.amax is None else result.amax
    return {"factors": factors, "amax": amax, "part_rows": part_rows}


def finished(result: Fp8Rows) -> Fp8Rows:
    """With the largest magnitude of each part instead of each program's."""
    if result.amax is None:
        return result
    bits = result.amax.view(result.factors.numel(), -1)
    # No rows: no magnitude.
    most = bits.amax(1) if bits.numel() else bits.new_zeros(len(bits))
    return Fp8Rows(values=result.values, factors=result.factors, amax=most.view(torch.float32))
