"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

As `fused_kernels.reference.dispatch_tokens`. Sums of bfloat16 are computed in fp32 and
rounded once.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.native.call import Operand, operation
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import dispatch_tokens as reference


def forward(x_TH: Tensor, source_R: Tensor) -> Tensor:
    """Copy each row's token into the buffer, [R, H]; a row of no token, -1, is zero."""
    if not runs_on(x_TH, source_R):
        return reference.forward(x_TH, source_R)
    (tokens, hidden), rows = x_TH.shape, source_R.shape[0]
    buffer_RH = x_TH.new_empty(rows, hidden)
    operands: list[Operand] = [
        (x_TH.contiguous(), x_TH.shape, x_TH.dtype),
        (source_R.contiguous(), (rows,), torch.int64),
        (buffer_RH, (rows, hidden), x_TH.dtype),
    ]
    sizes = tokens, hidden, rows, torch.get_num_threads()
    operation("dispatch_forward", x_TH.dtype, operands, *sizes)()
    return buffer_RH


def forward_fp8(x_TH: Tensor, source_R: Tensor, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised in passes of torch."""
    return quantized(forward(x_TH, source_R), output)


def backward(grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Gradient of the tokens, [T, H]: the sum over their kept choices."""
    if not runs_on(grad_RH, rows_TK, kept_TK):
        return reference.backward(grad_RH, rows_TK, kept_TK)
    (rows, hidden), (tokens, topk) = grad_RH.shape, rows_TK.shape
    grad_TH = grad_RH.new_empty(tokens, hidden)
    operands: list[Operand] = [
        (grad_RH.contiguous(), grad_RH.shape, grad_RH.dtype),
        (rows_TK.contiguous(), rows_TK.shape, torch.int64),
        (kept_TK.contiguous(), rows_TK.shape, torch.bool),
        (grad_TH, (tokens, hidden), grad_RH.dtype),
    ]
    sizes = tokens, topk, hidden, rows, torch.get_num_threads()
    operation("dispatch_backward", grad_RH.dtype, operands, *sizes)()
    return grad_TH
