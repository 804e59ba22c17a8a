"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

As `fused_kernels.reference.dispatch_tokens`. Sums are computed in fp32 and rounded once.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import dispatch_tokens as reference
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


def backward(grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Gradient of the tokens, [T, H]: the sum over their kept choices."""
    if not runs_on(grad_RH, rows_TK, kept_TK):
        return reference.backward(grad_RH, rows_TK, kept_TK)
    choices = (
        checked("dispatch_tokens", rows_TK, rows_TK.shape, torch.int64),
        checked("dispatch_tokens", kept_TK, rows_TK.shape, torch.bool),
    )
    return sum_rows(checked("dispatch_tokens", grad_RH, grad_RH.shape), None, choices)
