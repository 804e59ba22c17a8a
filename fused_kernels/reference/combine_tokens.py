"""Buffer rows back to tokens: the sum over a token's choices, weighted by router probabilities.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kernels.row_blocks import row_blocks


def forward(out_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """y_t = sum over kept k of weights[t, k] * out[rows[t, k]].

    Args:
        out_RH: expert outputs. Rows that no kept choice names may hold anything, NaN included.
        weights_TK: combine weights, fp32; rounded to the dtype of ``out_RH``.
        rows_TK: int64 row of each choice; any valid row where the choice is dropped.
        kept_TK: bool, whether the choice counts.

    Returns:
        [T, H] in the dtype of ``out_RH``; zero for a token without a kept choice.
    """
    weight_TK = weights_TK.where(kept_TK, 0.0).to(out_RH.dtype)
    rows_TK, none_T1 = rows_of_kept(rows_TK, kept_TK)
    # One pass: gather, scale and sum without a [T, K, H] temporary.
    y_TH = F.embedding_bag(rows_TK, out_RH, mode="sum", per_sample_weights=weight_TK)
    return y_TH.masked_fill_(none_T1, 0.0)


def rows_of_kept(rows_TK: Tensor, kept_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows such that a weighted sum reads no row of others, in which zero times infinity is NaN.

    Returns:
        Rows in which a dropped choice names the row of a kept one of its token, [T, K]; and which
        tokens have none, bool [T, 1].
    """
    first_T1 = kept_TK.to(torch.uint8).argmax(1, keepdim=True)
    return rows_TK.where(kept_TK, rows_TK.gather(1, first_T1)), ~kept_TK.any(1, keepdim=True)


def backward(
    grad_TH: Tensor,
    out_RH: Tensor,
    weights_TK: Tensor,
    rows_TK: Tensor,
    kept_TK: Tensor,
    source_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the expert outputs and of the weights.

    Args:
        grad_TH: gradient of y.
        out_RH: as in `forward`.
        weights_TK: as in `forward`.
        rows_TK: as in `forward`.
        kept_TK: as in `forward`.
        source_R: int64 token of each row, any valid one where the row is empty.

    Returns:
        grad_RH, zero in empty rows, and grad_TK in the dtype of the weights.
    """
    # What is dropped adds nothing to the row that it names.
    weight_TK = weights_TK.where(kept_TK, 0.0).flatten()
    weight_R = weights_TK.new_zeros(out_RH.shape[0]).scatter_add_(0, rows_TK.flatten(), weight_TK)
    scale_R1 = weight_R.to(grad_TH.dtype).unsqueeze(1)
    empty_R1 = empty_rows(out_RH.shape[0], rows_TK, kept_TK).unsqueeze(1)
    if out_RH.dtype == weights_TK.dtype:
        grad_RH = F.embedding_bag(
            source_R.unsqueeze(1), grad_TH, mode="sum", per_sample_weights=scale_R1
        )
        dots_TK = _dots(grad_TH, out_RH, rows_TK)
        return grad_RH.masked_fill_(empty_R1, 0.0), dots_TK.where(kept_TK, 0.0)
    # Sums in the weights' dtype, row by row: each row is of one choice at most.
    grad_RH, dot_R = torch.empty_like(out_RH), torch.empty_like(weight_R)
    parts = row_blocks(out_RH.shape[1], source_R, out_RH, scale_R1, grad_RH, dot_R)
    for source, out, scale, grad, dot in parts:
        torch.index_select(grad_TH, 0, source, out=grad)
        torch.sum(grad * out, -1, dtype=dot.dtype, out=dot)
        grad.mul_(scale)
    return grad_RH.masked_fill_(empty_R1, 0.0), dot_R[rows_TK].where(kept_TK, 0.0)


def empty_rows(rows: int, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Which of the buffer's rows no kept choice has, bool [R]."""
    named_R = kept_TK.new_zeros(rows, dtype=torch.uint8)
    return named_R.scatter_add_(0, rows_TK.flatten(), kept_TK.flatten().to(torch.uint8)) == 0


def _dots(grad_TH: Tensor, out_RH: Tensor, rows_TK: Tensor) -> Tensor:
    """The product of each token's gradient with each row that it names, [T, K].

    Neither is copied. Sums are rounded to the operands' dtype.
    """
    tokens, topk = rows_TK.shape
    token_A = torch.arange(tokens, device=rows_TK.device).repeat_interleave(topk)
    unused_offsets = token_A[:0]
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_TH, out_RH, rows_TK.flatten(), unused_offsets, token_A, 0
    ).view(tokens, topk)
