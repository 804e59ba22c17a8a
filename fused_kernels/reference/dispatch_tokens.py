"""Tokens to buffer rows: a gather, and in the backward pass a sum of K gathered rows.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
