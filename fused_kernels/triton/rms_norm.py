"""T5's RMSNorm, a pass over memory each way.

As `fused_kernels.reference.rms_norm`. A program holds whole rows. The gradient of the scale is
summed in fp32 by as many programs as `PARTS`, each over consecutive rows, and then over them.

Shapes: R rows, W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import rms_norm as reference
from fused_kernels.triton.launch import cdiv, checked, computed, launch, warps_of

ELEMENTS = 2048
"""Of a program, where rows are shorter: it then holds several."""
WIDEST: int | None = 16384
"""Columns of a row that 16 warps hold. Compiled for 9.0 in bf16, the backward pass spills nothing
up to 8192 columns; it has 24 loads and stores of local memory at 16384, and 1901 at 32768."""
PARTS = 256
"""Programs of the backward pass: about two for each SM, whatever the device, so that the order of
the sum does not depend on it."""


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    inverse: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for `ROWS` rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    found = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(found * found, axis=1) / width + EPS)
    # Rounded before it is scaled, as T5 does.
    unit = (found * scale[:, None]).to(x.dtype.element_ty).to(WIDE)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    tl.store(y + at, (unit * factor[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale, mask=row < rows)


@triton.jit
def rms_norm_backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    inverse: tl.tensor,
    grad_x: tl.tensor,
    grad_weight: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    each: tl.tensor,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for ``each`` consecutive rows: their gradients, and a part of the scale's."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    total = tl.zeros((BLOCK,), WIDE)
    for start in range(0, each, ROWS):
        row = part * each + start + tl.arange(0, ROWS)
        # The last step of a program must not count rows of the next one.
        valid = (start + tl.arange(0, ROWS) < each) & (row < rows)
        at = row[:, None] * width + column[None, :]
        inside = valid[:, None] & (column[None, :] < width)
        scale = tl.load(inverse + row, mask=valid, other=0.0)
        unit = tl.load(x + at, mask=inside, other=0.0).to(WIDE) * scale[:, None]
        slope = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
        total += tl.sum(slope * unit, axis=0)
        slope *= factor[None, :]
        mean = tl.sum(slope * unit, axis=1) / width
        result = (slope - unit * mean[:, None]) * scale[:, None]
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + part * width + column, total, mask=column < width)


def forward(x: Tensor, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result in the shape of ``x``, and 1 / r, [..., 1]."""
    if not runs_on(x, weight_W):
        return reference.forward(x, weight_W, eps)
    x, rows = checked("rms_norm", x, x.shape), _rows(x)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight_W.dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    inverse = x.new_empty(*x.shape[:-1], 1, dtype=wide)
    block, height = _tile(x)
    arguments: dict[str, Tensor | int] = {
        "x": x,
        "weight": checked("rms_norm", weight_W, x.shape[-1:]),
        "y": y,
        "inverse": inverse,
        "rows": rows,
        "width": x.shape[-1],
    }
    constants = {"EPS": eps, "WIDE": computed(x.dtype), "ROWS": height, "BLOCK": block}
    launch(rms_norm_kernel, cdiv(rows, height), arguments, constants, warps_of(block * height))
    return y, inverse


def backward(grad: Tensor, x: Tensor, weight_W: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale, in their dtypes."""
    if not runs_on(grad, x, weight_W, inverse):
        return reference.backward(grad, x, weight_W, inverse)
    x, rows, width = checked("rms_norm", x, x.shape), _rows(x), x.shape[-1]
    grad_x = x.new_empty(x.shape)
    block, height = _tile(x)
    each = max(1, cdiv(rows, PARTS))
    parts = cdiv(rows, each)
    grad_PW = x.new_empty(parts, width, dtype=inverse.dtype)
    arguments: dict[str, Tensor | int] = {
        "grad": checked("rms_norm", grad, x.shape),
        "x": x,
        "weight": checked("rms_norm", weight_W, (width,)),
        "inverse": checked("rms_norm", inverse, (*x.shape[:-1], 1)),
        "grad_x": grad_x,
        "grad_weight": grad_PW,
        "rows": rows,
        "width": width,
        "each": each,
    }
    constants = {"WIDE": computed(x.dtype), "ROWS": height, "BLOCK": block}
    launch(rms_norm_backward_kernel, parts, arguments, constants, warps_of(block * height, 8))
    return grad_x, grad_PW.sum(0).to(weight_W.dtype)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _tile(x: Tensor) -> tuple[int, int]:
    """Columns and rows that a program holds.

    Raises:
        ValueError: rows are longer than a program can hold.
    """
    width = x.shape[-1]
    if WIDEST is not None and width > WIDEST:
        raise ValueError(f"rms_norm: rows of {width}, expected at most {WIDEST}; use reference")
    block = triton.next_power_of_2(max(1, width))
    return block, max(1, ELEMENTS // block)
