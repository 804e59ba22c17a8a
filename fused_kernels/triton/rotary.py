"""Rotary position embedding in one pass, of a strided view as well as of a whole tensor.

As `fused_kernels.reference.rotary`. Queries and keys are views of a projection of both: they are
read where they lie.

Shapes: S tokens of a row, B rows, N heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import rotary as reference
from fused_kernels.triton.launch import (
    block_of,
    cdiv,
    checked,
    computed,
    launch,
    warps_of,
)

ELEMENTS = 2048
"""Of the first halves of heads that a program rotates."""


@triton.jit
def rotary_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    batch: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    stride_s: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    angle_s: tl.tensor,
    angle_b: tl.tensor,
    SIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for `HEADS` heads of a token."""
    parts = tl.cdiv(heads, HEADS)
    token, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    s, b = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    head = part * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head[:, None] < heads) & (column[None, :] < half)
    # Heads of a transposed gradient are a whole sequence apart: beyond 32 bits for a long one.
    apart = head[:, None].to(tl.int64) * stride_n
    at = x + s * stride_s + b * stride_b + apart + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(WIDE)
    second = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    angle = s * angle_s + b * angle_b + column
    cosine = tl.load(cos + angle, mask=column < half, other=0.0).to(WIDE)[None, :]
    sine = tl.load(sin + angle, mask=column < half, other=0.0).to(WIDE)[None, :] * SIGN
    to = out + (token.to(tl.int64) * heads + head[:, None]) * 2 * half + column[None, :]
    element = out.dtype.element_ty
    tl.store(to, (first * cosine - second * sine).to(element), mask=inside)
    tl.store(to + half, (second * cosine + first * sine).to(element), mask=inside)


def forward(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated, contiguous, in the dtype of ``x_SBND``."""
    if not runs_on(x_SBND, cos, sin):
        return reference.forward(x_SBND, cos, sin)
    return _rotated(x_SBND, cos, sin, 1)


def backward(grad_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x, contiguous."""
    if not runs_on(grad_SBND, cos, sin):
        return reference.backward(grad_SBND, cos, sin)
    return _rotated(grad_SBND, cos, sin, -1)


def _rotated(x_SBND: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    length, batch, heads, dim = x_SBND.shape
    # Heads must be whole; how far they are apart does not matter.
    x_SBND = x_SBND if x_SBND.stride(-1) == 1 or dim == 1 else x_SBND.contiguous()
    rows = (batch,) if cos.dim() == 3 else ()
    angles = checked("rotary", cos, (length, *rows, dim // 2))
    out_SBND = x_SBND.new_empty(x_SBND.shape)
    block = block_of(dim // 2, dim)
    together = min(triton.next_power_of_2(max(1, heads)), max(1, ELEMENTS // block))
    arguments: dict[str, Tensor | int] = {
        "x": x_SBND,
        "cos": angles,
        "sin": checked("rotary", sin, cos.shape, cos.dtype),
        "out": out_SBND,
        "batch": batch,
        "heads": heads,
        "half": dim // 2,
        "stride_s": x_SBND.stride(0),
        "stride_b": x_SBND.stride(1),
        "stride_n": x_SBND.stride(2),
        "angle_s": angles.stride(0),
        "angle_b": angles.stride(1) if rows else 0,
    }
    constants: dict[str, Any] = {
        "SIGN": sign,
        "WIDE": computed(cos.dtype),
        "HEADS": together,
        "BLOCK": block,
    }
    programs = length * batch * cdiv(heads, together)
    launch(rotary_kernel, programs, arguments, constants, warps_of(together * block, 8))
    return out_SBND
