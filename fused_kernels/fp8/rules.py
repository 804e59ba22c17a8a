"""Quantisation of a GEMM operand to FP8, by recipe.

Every function takes an operand [..., M, K] that the GEMM sums over K and returns FP8 values with
what they are multiplied by to come back: one inverse scale a tensor, or one a block. Scales are
fp32 or powers of two, values are rounded to nearest even and saturate, as in Transformer Engine
2.11 (`recipe_common.cuh`, `ptx.cuh`, `custom_recipes/`) and in OCP's Microscaling Formats 1.0.

A sum over K needs scales that are constant along what a tensor core adds up, so blocks lie along K,
and a tensor that is an operand of several GEMMs is quantised for each of them from its own values.

    x [T, K] of y = x W^T, recipe mxfp8, K = 64: two scales a row, of x[:, 0:32] and x[:, 32:64].
    dW = dy^T x sums over T: there x^T [K, T] has a scale for each 32 tokens of a column of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
"""OFP8: 4 bits of exponent and 3 of mantissa, up to 448; 5 and 2, up to 57344."""
BLOCK = 128
"""Elements along K of one scale of `per_block`, and rows of one scale of weights."""
MX_BLOCK = 32
"""Elements along K of one scale of `mxfp8`."""


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest FP8 value, ties to even; beyond the range the largest one. NaN stays NaN.

    PyTorch's own cast makes values beyond the range NaN (e4m3) or infinite (e5m2).
    """
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def scale_of(
    amax: Tensor, dtype: torch.dtype, source: torch.dtype, power_of_two: bool = False
) -> Tensor:
    """What values up to ``amax`` are multiplied by to fill the range of an FP8 type.

    Args:
        amax: fp32, largest magnitudes.
        dtype: FP8 type.
        source: type of the values; its largest number replaces a scale that overflows.
        power_of_two: round down to one, so that scaling loses no bit.

    Returns:
        fp32; 1 where ``amax`` is 0 or not finite.
    """
    limit = source if source.itemsize < 4 else torch.float32
    scale = torch.finfo(dtype).max / amax
    scale = scale.masked_fill(scale.isinf(), torch.finfo(limit).max)
    if power_of_two:
        # Without its mantissa, a positive number is the power of two below it.
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    usable = (amax > 0) & amax.isfinite()
    return scale.where(usable, 1.0)


def amax_of(x: Tensor) -> Tensor:
    """Largest magnitude of each operand, fp32 [..., 1, 1]; 0 of an empty one."""
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-2], 1, 1, dtype=torch.float32)
    return x.abs().amax((-2, -1), keepdim=True).float()


def per_tensor(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One scale for an operand: its own, or one that is given (delayed scaling).

    Args:
        x: [..., M, K].
        dtype: FP8 type.
        scale: fp32, broadcastable to [..., 1, 1]; `None`: the largest value of ``x`` fills the
            range (current scaling).

    Returns:
        FP8 values, and the fp32 inverse scale [..., 1, 1].
    """
    if scale is None:
        scale = scale_of(amax_of(x), dtype, x.dtype)
    return round_to(x.float() * scale, dtype), scale.reciprocal()


def per_block(x: Tensor, dtype: torch.dtype, rows: int = 1) -> tuple[Tensor, Tensor]:
    """A power of two for each ``rows`` x 128 elements.

    Args:
        x: [..., M, K].
        dtype: FP8 type.
        rows: 1 for activations and gradients, 128 for weights.

    Returns:
        FP8 values, and fp32 inverse scales [..., M / rows, K / 128], rounded up.
    """
    blocks = _blocks(x.float(), rows, BLOCK)
    scale = scale_of(blocks.abs().amax((-3, -1), keepdim=True), dtype, x.dtype, power_of_two=True)
    values = round_to(blocks * scale, dtype)
    return _joined(values, x), scale.reciprocal().squeeze(-1).squeeze(-2)


def mxfp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A power of two, E8M0, for each 32 elements along K.

    Returns:
        FP8 values, and exponents uint8 [..., M, K / 32] rounded up: factors are 2^(exponent - 127).
    """
    blocks = _blocks(x.float(), 1, MX_BLOCK)
    # The product with the rounded inverse, not a quotient, decides on which side of a power of two
    # a block falls.
    inverse = blocks.new_full((), torch.finfo(dtype).max).reciprocal()
    exponent = _exponent_above(blocks.abs().amax((-3, -1), keepdim=True) * inverse)
    # A block of zeros, or of numbers next to it, keeps its values: 2^127 may not be used.
    back = ((254 - exponent) << 23).view(torch.float32).masked_fill(exponent == 0, 1.0)
    values = round_to(blocks * back, dtype)
    return _joined(values, x), exponent.to(torch.uint8).squeeze(-1).squeeze(-2)


def _exponent_above(x: Tensor) -> Tensor:
    """Biased exponents, int32, of the powers of two that are not below fp32 ``x`` >= 0.

    Within E8M0: 2^-127 to 2^127; infinity saturates, NaN is 255.
    """
    bits = x.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Numbers of up to 2^-127 are subnormal, of at most half their range.
    above = (mantissa > 0) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = (exponent + above).clamp(max=254)
    return exponent.masked_fill(x.isnan(), 255)


def dequantized(values: Tensor, factors: Tensor, rows: int = 1, block: int = 0) -> Tensor:
    """FP8 values times their factors, in fp32.

    Args:
        values: [..., M, K].
        factors: the second result of `per_tensor`, `per_block` or `mxfp8`.
        rows: rows of one factor, with ``block``.
        block: columns of one factor; 0: one factor a tensor.
    """
    if factors.dtype == torch.uint8:
        exponent = factors.to(torch.int32)
        # 2^-127 is subnormal.
        factors = torch.where(exponent == 0, 0x400000, exponent << 23).view(torch.float32)
    if not block:
        return values.float() * factors
    wide = values.float()
    return _joined(_blocks(wide, rows, block) * factors[..., :, None, :, None], wide)


def _blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """[..., M / rows, rows, K / columns, columns], with zeros where a block is not full."""
    x = F.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_blocks` for a tensor of the shape of ``like``."""
    whole = blocks.flatten(-4, -3).flatten(-2, -1)
    return whole[..., : like.shape[-2], : like.shape[-1]].contiguous()
