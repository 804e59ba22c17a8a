"""Buffer rows back to tokens: the sum over a token's choices, weighted by router probabilities.

As `fused_kernels.reference.combine_tokens`. Elements of bfloat16 are computed in fp32, weights
included, and rounded once.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kernels.native.call import Operand, computed, operation
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import combine_tokens as reference


def forward(out_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """y_t = sum over kept k of weights[t, k] * out[rows[t, k]], [T, H]."""
    if not runs_on(out_RH, weights_TK, rows_TK, kept_TK):
        return reference.forward(out_RH, weights_TK, rows_TK, kept_TK)
    y_TH = out_RH.new_empty(rows_TK.shape[0], out_RH.shape[1])
    operands: list[Operand] = [
        (out_RH.contiguous(), out_RH.shape, out_RH.dtype),
        *_choices(out_RH, weights_TK, rows_TK, kept_TK),
        (y_TH, y_TH.shape, out_RH.dtype),
    ]
    operation("combine_forward", out_RH.dtype, operands, *_sizes(out_RH, rows_TK))()
    return y_TH


def backward(
    grad_TH: Tensor,
    out_RH: Tensor,
    weights_TK: Tensor,
    rows_TK: Tensor,
    kept_TK: Tensor,
    source_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the expert outputs, zero in empty rows, and of the weights, in their dtype.

    ``source_R`` is not needed: a token goes to the rows of its choices, each row is of one at most.
    """
    if not runs_on(grad_TH, out_RH, weights_TK, rows_TK, kept_TK):
        return reference.backward(grad_TH, out_RH, weights_TK, rows_TK, kept_TK, source_R)
    grad_RH = out_RH.new_empty(out_RH.shape)
    grad_TK = weights_TK.new_empty(rows_TK.shape, dtype=computed(out_RH.dtype))
    hidden = rows_TK.shape[0], out_RH.shape[1]
    operands: list[Operand] = [
        (grad_TH.contiguous(), hidden, out_RH.dtype),
        (out_RH.contiguous(), out_RH.shape, out_RH.dtype),
        *_choices(out_RH, weights_TK, rows_TK, kept_TK),
        (grad_RH, out_RH.shape, out_RH.dtype),
        (grad_TK, rows_TK.shape, grad_TK.dtype),
    ]
    operation("combine_backward", out_RH.dtype, operands, *_sizes(out_RH, rows_TK))()
    return grad_RH, grad_TK.to(weights_TK.dtype)


def _choices(out_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> list[Operand]:
    """Weights in the dtype of the computation, rows, kept."""
    shape, dtype = rows_TK.shape, computed(out_RH.dtype)
    return [
        (weights_TK.to(dtype).contiguous(), shape, dtype),
        (rows_TK.contiguous(), shape, torch.int64),
        (kept_TK.contiguous(), shape, torch.bool),
    ]


def _sizes(out_RH: Tensor, rows_TK: Tensor) -> tuple[int, ...]:
    """T, K, H, R, threads."""
    return *rows_TK.shape, out_RH.shape[1], out_RH.shape[0], torch.get_num_threads()
