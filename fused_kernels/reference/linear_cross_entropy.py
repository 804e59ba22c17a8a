"""Logits and their softmax for a chunk of tokens at a time: the matrix of all logits never exists.

The cross entropy of token t and its squared log-normaliser need three numbers of its row of logits
z_t = scale W x_t: the maximum, the sum of exp(z - maximum), and the target's logit. With

    dz[t, v] = a_t softmax(z_t)[v] - b_t [v = target_t]

(a = b = 1 for the plain cross entropy) the gradients are dx = scale dz W and dW = scale dz' x. The
forward pass keeps the three numbers of every token and the exponentials of the last chunk. The
backward pass starts with that chunk and computes the logits of the others again: one GEMM more than
with all logits in memory, and none more where there is one chunk. Computing gradients in the
forward pass instead (arXiv 2410.10989) saves that GEMM, but needs log Z of all vocabulary shards
chunk by chunk, two collectives each, holds a gradient of W until the backward pass, and must know
a and b beforehand.

The columns may be one shard of a vocabulary: every number is that of this shard alone, except
log Z, which the backward pass is given.

Shapes: T tokens, H hidden, V vocabulary columns (of this shard), C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kernels.gemm import gemm, multiplies_halves, operand, result_dtype
from fused_kernels.row_blocks import chunk_size, chunks_of, row_blocks


def forward(
    x_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Maximum, sum of exponentials and target's logit of every token.

    Args:
        x_TH: tokens.
        weight_VH: the logits matrix, in the dtype of ``x_TH``.
        target_T: int64 column of each token's target; outside of [0, V) for none.
        scale: factor of the logits.
        chunk_tokens: the most tokens whose logits exist at once; chunks are of about equal size.

    Returns:
        stats_3T in fp32 (fp64 for fp64): maximum m of the logits; sum of exp(logit - m); logit of
        the target minus m, or 0 without one. And what `backward` takes as ``kept``: [C, V], the
        exponentials of the last chunk.
    """
    tokens, columns = x_TH.shape[0], weight_VH.shape[0]
    size, dtype = chunk_size(tokens, chunk_tokens), result_dtype(x_TH.dtype)
    kept_CV = x_TH.new_empty(size, columns, dtype=dtype)
    stats_3T = x_TH.new_empty(3, tokens, dtype=dtype)
    ours_T1, index_T1 = _own_targets(target_T, columns)
    weight_HV = operand(weight_VH).t()
    rows = *stats_3T.unsqueeze(-1), index_T1
    for chunk in chunks_of(tokens, size):
        kept = kept_CV[: chunk.stop - chunk.start]
        logits = gemm(kept, operand(x_TH[chunk]), weight_HV, alpha=scale)
        parts = row_blocks(columns, logits, *(row[chunk] for row in rows))
        for part, top, total, picked, index in parts:
            torch.amax(part, 1, keepdim=True, out=top)
            torch.gather(part.sub_(top), 1, index, out=picked)
            torch.sum(part.exp_(), 1, keepdim=True, out=total)
    stats_3T[2].masked_fill_(~ours_T1.squeeze(1), 0.0)
    return stats_3T, kept_CV


def backward(
    x_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    scale: float,
    stats_3T: Tensor,
    log_z_T: Tensor,
    coefficients_2T: Tensor,
    kept: Tensor,
    grad_VH: Tensor | None,
) -> Tensor:
    """Gradients of tokens and weight.

    Args:
        x_TH: as in `forward`.
        weight_VH: as in `forward`.
        target_T: as in `forward`.
        scale: as in `forward`.
        stats_3T: from `forward`.
        log_z_T: log of the sum of exp(logit) over the whole vocabulary.
        coefficients_2T: a, of the softmax, and b, of the target; in the dtype of ``stats_3T``.
        kept: from `forward`; **overwritten**.
        grad_VH: the weight's gradient is added to it; in the dtype of ``stats_3T``. `None` if it is
            not needed.

    Returns:
        The gradient of the tokens, [T, H], in their dtype: of this shard, to be summed over all.
    """
    tokens, columns = x_TH.shape[0], weight_VH.shape[0]
    ours_T1, index_T1 = _own_targets(target_T, columns)
    softmax_T1, target_T1 = coefficients_2T.unsqueeze(-1)
    target_T1 = torch.where(ours_T1, -target_T1, 0.0)
    log_z_T1, top_T1 = log_z_T.unsqueeze(-1), stats_3T[0].unsqueeze(-1)
    weight, grad_TH = operand(weight_VH), torch.empty_like(x_TH)
    chunks = chunks_of(tokens, kept.shape[0])
    for rows in reversed(chunks):
        grad_CV, x_CH = kept[: rows.stop - rows.start], operand(x_TH[rows])
        factor = softmax_T1[rows]
        if rows == chunks[-1]:
            grad_CV.mul_(factor * (top_T1[rows] - log_z_T1[rows]).exp_())
        else:
            gemm(grad_CV, x_CH, weight.t(), alpha=scale)
            for part, log_z, each in row_blocks(columns, grad_CV, log_z_T1[rows], factor):
                part.sub_(log_z).exp_().mul_(each)
        grad_CV.scatter_add_(1, index_T1[rows], target_T1[rows])
        # Rounded to the operands' dtype where the GEMMs multiply that: both gradients are, too.
        grad_CV = grad_CV.to(x_TH.dtype) if multiplies_halves(x_TH) else grad_CV
        grad_CH = grad_CV.new_empty(x_CH.shape, dtype=stats_3T.dtype)
        grad_TH[rows] = gemm(grad_CH, grad_CV, weight, alpha=scale)
        if grad_VH is not None:
            gemm(grad_VH, grad_CV.t(), x_CH, alpha=scale, beta=1.0)
    return grad_TH


def _own_targets(target_T: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a token's target is among the columns, and its column, or 0; both [T, 1]."""
    ours_T = (target_T >= 0) & (target_T < columns)
    return ours_T.unsqueeze(1), torch.where(ours_T, target_T, 0).unsqueeze(1)
