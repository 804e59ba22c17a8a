"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

As `fused_kernels.reference.dispatch_tokens`. Sums of bfloat16 are made in fp32 and rounded once.
Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kernels.native.library import operation, runs_on
from fused_kernels.reference import dispatch_tokens as reference


def forward(x_TH: Tensor, source_R: Tensor) -> Tensor:
    """Copy each row's token into the buffer, [R, H]."""
    if not runs_on(x_TH, source_R):
        return reference.forward(x_TH, source_R)
    (tokens, hidden), rows = x_TH.shape, source_R.shape[0]
    buffer_RH = x_TH.new_empty(rows, hidden)
    tensors = x_TH.contiguous(), source_R.contiguous(), buffer_RH
    sizes = tokens, hidden, rows, torch.get_num_threads()
    operation("dispatch_forward", x_TH.dtype, *tensors, *sizes)()
    return buffer_RH


def backward(grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Gradient of the tokens, [T, H]: the sum over their kept choices."""
    if not runs_on(grad_RH, rows_TK, kept_TK):
        return reference.backward(grad_RH, rows_TK, kept_TK)
    (rows, hidden), (tokens, topk) = grad_RH.shape, rows_TK.shape
    grad_TH = grad_RH.new_empty(tokens, hidden)
    tensors = grad_RH.contiguous(), rows_TK.contiguous(), kept_TK.contiguous(), grad_TH
    sizes = tokens, topk, hidden, rows, torch.get_num_threads()
    operation("dispatch_backward", grad_RH.dtype, *tensors, *sizes)()
    return grad_TH
