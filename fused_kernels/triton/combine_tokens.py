"""Buffer rows back to tokens: the sum over a token's choices, weighted by router probabilities.

As `fused_kernels.reference.combine_tokens`. Elements are computed in fp32, weights included, and
rounded once.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import combine_tokens as reference
from fused_kernels.triton.launch import (
    block_of,
    checked,
    computed,
    launch,
    warps_of,
)
from fused_kernels.triton.sum_rows import sum_rows

ELEMENTS = 4096
"""Of one operand that a program of the backward pass holds, over all choices of its token."""


@triton.jit
def combine_backward_kernel(
    grad: tl.tensor,
    values: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    kept: tl.tensor,
    source: tl.tensor,
    grad_values: tl.tensor,
    grad_weights: tl.tensor,
    tokens: tl.tensor,
    hidden: tl.tensor,
    CHOICES: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for each token, which writes its rows, and one for each row, for empty ones.

    A token's gradient is read once for all its choices, and no row is written twice.
    """
    program = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PADDED)
    if program < tokens:
        at_k = program * CHOICES + k
        row_k = tl.load(rows + at_k, mask=k < CHOICES, other=0)
        kept_k = tl.load(kept + at_k, mask=k < CHOICES, other=0) != 0
        weight_k = tl.load(weights + at_k, mask=kept_k, other=0.0).to(WIDE)
        dot_k = tl.zeros((PADDED,), WIDE)
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < hidden
            slope = tl.load(grad + program * hidden + column, mask=inside, other=0.0).to(WIDE)
            at = row_k[:, None] * hidden + column[None, :]
            counts = kept_k[:, None] & inside[None, :]
            value = tl.load(values + at, mask=counts, other=0.0).to(WIDE)
            dot_k += tl.sum(value * slope[None, :], axis=1)
            made = (slope[None, :] * weight_k[:, None]).to(grad_values.dtype.element_ty)
            tl.store(grad_values + at, made, mask=counts)
        dot_k = tl.where(kept_k, dot_k, 0.0)
        tl.store(grad_weights + at_k, dot_k.to(grad_weights.dtype.element_ty), mask=k < CHOICES)
    else:
        row = program - tokens
        at_k = tl.load(source + row) * CHOICES + k
        row_k = tl.load(rows + at_k, mask=k < CHOICES, other=-1)
        kept_k = tl.load(kept + at_k, mask=k < CHOICES, other=0) != 0
        filled = tl.max(((row_k == row) & kept_k).to(tl.int32), axis=0)
        if filled == 0:
            for start in range(0, hidden, BLOCK):
                column = start + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), grad_values.dtype.element_ty)
                tl.store(grad_values + row * hidden + column, zero, mask=column < hidden)


def forward(out_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """y_t = sum over kept k of weights[t, k] * out[rows[t, k]], [T, H]."""
    if not runs_on(out_RH, weights_TK, rows_TK, kept_TK):
        return reference.forward(out_RH, weights_TK, rows_TK, kept_TK)
    weights_TK, *choices = _choices(weights_TK, rows_TK, kept_TK)
    values_RH = checked("combine_tokens", out_RH, out_RH.shape)
    return sum_rows(values_RH, weights_TK, (choices[0], choices[1]))


def backward(
    grad_TH: Tensor,
    out_RH: Tensor,
    weights_TK: Tensor,
    rows_TK: Tensor,
    kept_TK: Tensor,
    source_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the expert outputs, zero in empty rows, and of the weights, in their dtype.

    ``source_R`` must name the token of every row that a kept choice has: rows of which no choice of
    their token is kept are the empty ones.
    """
    if not runs_on(grad_TH, out_RH, weights_TK, rows_TK, kept_TK, source_R):
        return reference.backward(grad_TH, out_RH, weights_TK, rows_TK, kept_TK, source_R)
    (tokens, topk), (buffer_rows, hidden) = rows_TK.shape, out_RH.shape
    grad_RH = out_RH.new_empty(buffer_rows, hidden)
    grad_TK = weights_TK.new_empty(tokens, topk)
    if tokens == 0:
        return grad_RH.zero_(), grad_TK
    weights_TK, rows_TK, kept_TK = _choices(weights_TK, rows_TK, kept_TK)
    name, padded = "combine_tokens", triton.next_power_of_2(topk)
    block = block_of(hidden, ELEMENTS // padded)
    arguments: dict[str, Tensor | int] = {
        "grad": checked(name, grad_TH, (tokens, hidden), out_RH.dtype),
        "values": checked(name, out_RH, out_RH.shape),
        "weights": weights_TK,
        "rows": rows_TK,
        "kept": kept_TK,
        "source": checked(name, source_R, (buffer_rows,), torch.int64),
        "grad_values": grad_RH,
        "grad_weights": grad_TK,
        "tokens": tokens,
        "hidden": hidden,
    }
    constants: dict[str, Any] = {
        "CHOICES": topk,
        "PADDED": padded,
        "WIDE": computed(out_RH.dtype),
        "BLOCK": block,
    }
    launch(
        combine_backward_kernel,
        tokens + buffer_rows,
        arguments,
        constants,
        warps_of(block * padded),
    )
    return grad_RH, grad_TK


def _choices(weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, rows and kept, with the shapes and dtypes that kernels expect."""
    shape = rows_TK.shape
    return (
        checked("combine_tokens", weights_TK, shape),
        checked("combine_tokens", rows_TK, shape, torch.int64),
        checked("combine_tokens", kept_TK, shape, torch.bool),
    )
