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
        out_RH: expert outputs; every row finite.
        weights_TK: combine weights, fp32; rounded to the dtype of ``out_RH``.
        rows_TK: int64 row of each choice; any valid row where the choice is dropped.
        kept_TK: bool, whether the choice counts.

    Returns:
        [T, H] in the dtype of ``out_RH``; zero for a token without a kept choice.
    """
    weight_TK = (weights_TK * kept_TK).to(out_RH.dtype)
    # One pass: gather, scale and sum without a [T, K, H] temporary.
    return F.embedding_bag(rows_TK, out_RH, mode="sum", per_sample_weights=weight_TK)


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
    weight_TK = (weights_TK * kept_TK).flatten()
    weight_R = weights_TK.new_zeros(out_RH.shape[0]).scatter_add_(0, rows_TK.flatten(), weight_TK)
    scale_R1 = weight_R.to(grad_TH.dtype).unsqueeze(1)
    if out_RH.dtype == weights_TK.dtype:
        grad_RH = F.embedding_bag(
            source_R.unsqueeze(1), grad_TH, mode="sum", per_sample_weights=scale_R1
        )
        return grad_RH, _dots(grad_TH, out_RH, rows_TK) * kept_TK
    # Sums in the weights' dtype, row by row: each row is of one choice at most.
    grad_RH, dot_R = torch.empty_like(out_RH), torch.empty_like(weight_R)
    parts = row_blocks(out_RH.shape[1], source_R, out_RH, scale_R1, grad_RH, dot_R)
    for source, out, scale, grad, dot in parts:
        torch.index_select(grad_TH, 0, source, out=grad)
        torch.sum(grad * out, -1, dtype=dot.dtype, out=dot)
        grad.mul_(scale)
    return grad_RH, dot_R[rows_TK] * kept_TK


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
