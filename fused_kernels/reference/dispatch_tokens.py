"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.reference.combine_tokens import rows_of_kept


def forward(x_TH: Tensor, source_R: Tensor) -> Tensor:
    """Copy each row's token into the buffer.

    Args:
        x_TH: tokens.
        source_R: int64 token of each row. A row that holds no token may name any, if its values
            are never read, or be -1: it is zero. Its gradient is zero in either case.

    Returns:
        The buffer, [R, H].
    """
    none_R = source_R == -1
    return x_TH.index_select(0, source_R + none_R).masked_fill_(none_R.unsqueeze(1), 0.0)


def forward_fp8(x_TH: Tensor, source_R: Tensor, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised.

    Args:
        x_TH: as in `forward`.
        source_R: as in `forward`. A row of no token, -1, is zero, and its scale that of zeros.
        output: FP8 type and scales.

    Returns:
        FP8 values of the buffer [R, H], with their factors.
    """
    return quantized(forward(x_TH, source_R), output)


def backward(grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Gradient of the tokens: the sum over their kept choices.

    Args:
        grad_RH: gradient of the buffer. Rows that no kept choice names may hold anything.
        rows_TK: int64 row of each choice; any valid row where the choice is dropped.
        kept_TK: bool, whether the choice has that row.

    Returns:
        The gradient of x, [T, H].
    """
    weight_TK = kept_TK.to(grad_RH.dtype)
    rows_TK, none_T1 = rows_of_kept(rows_TK, kept_TK)
    dx_TH = F.embedding_bag(rows_TK, grad_RH, mode="sum", per_sample_weights=weight_TK)
    return dx_TH.masked_fill_(none_T1, 0.0)
