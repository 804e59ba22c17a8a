"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

As `fused_kernels.reference.dispatch_tokens`. Sums are computed in fp32 and rounded once.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import dispatch_tokens as reference
from fused_kernels.triton.fp8 import (
    check_device,
    constants_of,
    converted,
    empty_rows,
    finished,
    magnitude,
    scale_arguments,
    store_blocks,
)
from fused_kernels.triton.launch import block_of, checked, launch, warps_of
from fused_kernels.triton.sum_rows import COLUMNS, sum_rows


@triton.jit
def copy_rows_kernel(
    x: tl.tensor, source: tl.tensor, out: tl.tensor, hidden: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """A program for each row; one of no token is zeroed, and reads nothing."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(source + row)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden
        found = tl.load(x + token * hidden + column, mask=inside & (token >= 0), other=0.0)
        tl.store(out + row * hidden + column, found, mask=inside)


@triton.jit
def copy_rows_fp8_kernel(
    x: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    factors: tl.tensor,
    amax: tl.tensor,
    hidden: tl.tensor,
    part_rows: tl.tensor,
    PER: tl.constexpr,
    MOST: tl.constexpr,
    INVERSE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for each row, quantised on the way.

    With blocks (``PER`` is not 0) ``factors`` is written. Else it is read, a scale for each
    ``part_rows`` rows, and ``amax`` gets the bits of the row's largest magnitude.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(source + row)
    most = tl.zeros((BLOCK,), tl.int32)
    if PER == 0:
        scale = tl.load(factors + row // part_rows)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden
        at = x + token * hidden + column
        found = tl.load(at, mask=inside & (token >= 0), other=0.0).to(tl.float32)
        if PER:
            store_blocks(found, out, factors, row, start, hidden, PER, MOST, INVERSE, LIMIT, BLOCK)
        else:
            most = tl.maximum(most, magnitude(found))
            values = converted(found * scale, MOST, out.dtype.element_ty)
            tl.store(out + row * hidden + column, values, mask=inside)
    if PER == 0:
        tl.store(amax + row, tl.max(most, 0))


def forward(x_TH: Tensor, source_R: Tensor) -> Tensor:
    """Copy each row's token into the buffer, [R, H]; a row of no token, -1, is zero."""
    if not runs_on(x_TH, source_R):
        return reference.forward(x_TH, source_R)
    (_, hidden), rows = x_TH.shape, source_R.shape[0]
    buffer_RH = x_TH.new_empty(rows, hidden)
    block = block_of(hidden, COLUMNS)
    arguments: dict[str, Tensor | int] = {
        "x": checked("dispatch_tokens", x_TH, x_TH.shape),
        "source": checked("dispatch_tokens", source_R, (rows,), torch.int64),
        "out": buffer_RH,
        "hidden": hidden,
    }
    launch(copy_rows_kernel, rows, arguments, {"BLOCK": block}, warps_of(block))
    return buffer_RH


def forward_fp8(x_TH: Tensor, source_R: Tensor, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised on the way."""
    if not runs_on(x_TH, source_R):
        return reference.forward_fp8(x_TH, source_R, output)
    check_device("dispatch_tokens", x_TH.device)
    (_, hidden), rows = x_TH.shape, source_R.shape[0]
    result = empty_rows(output, x_TH, rows, hidden, 1)
    block = max(block_of(hidden, COLUMNS), output.block)
    arguments: dict[str, Tensor | int] = {
        "x": checked("dispatch_tokens", x_TH, x_TH.shape),
        "source": checked("dispatch_tokens", source_R, (rows,), torch.int64),
        "out": result.values,
        "hidden": hidden,
        **scale_arguments(output, result),
    }
    constants = {**constants_of(output, x_TH.dtype), "BLOCK": block}
    launch(copy_rows_fp8_kernel, rows, arguments, constants, warps_of(block))
    return finished(result)


def backward(grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Gradient of the tokens, [T, H]: the sum over their kept choices."""
    if not runs_on(grad_RH, rows_TK, kept_TK):
        return reference.backward(grad_RH, rows_TK, kept_TK)
    choices = (
        checked("dispatch_tokens", rows_TK, rows_TK.shape, torch.int64),
        checked("dispatch_tokens", kept_TK, rows_TK.shape, torch.bool),
    )
    return sum_rows(checked("dispatch_tokens", grad_RH, grad_RH.shape), None, choices)
