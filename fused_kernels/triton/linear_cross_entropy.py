"""Loss statistics and gradients of a chunk of logits, one pass over them each; torch multiplies.

As `fused_kernels.reference.linear_cross_entropy`, with three differences: a row's maximum and sum
are found together (Milakov and Gimelshein, arXiv 1805.02867), so that logits are read once and not
written; the logits of the last chunk are kept, not their exponentials; and the gradient is written
in the dtype that its GEMMs multiply, with the target's part subtracted on the way. On a GPU with
bf16 tokens that is 4 and 6 bytes for each logit, where the reference's kernels take 28 and 42.

Shapes: T tokens, H hidden, V vocabulary columns (of this shard), C tokens of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.gemm import gemm, multiplies_halves, operand, result_dtype
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import linear_cross_entropy as reference
from fused_kernels.row_blocks import chunk_size, chunks_of
from fused_kernels.triton.launch import block_of, checked, computed, launch, warps_of

COLUMNS = 4096
"""Logits of a row that a program holds at once."""


@triton.jit
def logits_stats_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    stats: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for each row of logits; ``stats`` has three values ``tokens`` apart."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), float("-inf"), WIDE)
    total = tl.zeros((), WIDE)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        found = tl.load(logits + row * columns + column, mask=column < columns, other=-float("inf"))
        higher = tl.maximum(top, tl.max(found, axis=0))
        # The first time exp(-inf) = 0 times the empty sum.
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(found - higher), axis=0)
        top = higher
    own = tl.load(target + row)
    ours = (own >= 0) & (own < columns)
    picked = tl.load(logits + row * columns + own, mask=ours, other=0.0)
    tl.store(stats + row, top)
    tl.store(stats + tokens + row, total)
    tl.store(stats + 2 * tokens + row, tl.where(ours, picked - top, 0.0))


@triton.jit
def logits_grad_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    log_z: tl.tensor,
    coefficients: tl.tensor,
    grad: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program for each row; ``coefficients`` has two values ``tokens`` apart."""
    row = tl.program_id(0).to(tl.int64)
    own, level = tl.load(target + row), tl.load(log_z + row)
    softmax = tl.load(coefficients + row)
    picked = tl.load(coefficients + tokens + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, inside = row * columns + column, column < columns
        found = tl.load(logits + at, mask=inside, other=-float("inf"))
        slope = tl.exp(found - level) * softmax
        # A target of another shard is no column.
        slope = tl.where(column == own, slope - picked, slope)
        # May overwrite the logits: a program reads a block before it writes it.
        tl.store(grad + at, slope.to(grad.dtype.element_ty), mask=inside)


def statistics(logits_CV: Tensor, target_C: Tensor, stats: Tensor, tokens: int) -> None:
    """Write maximum, sum of exponentials and target's logit of each row.

    Args:
        logits_CV: contiguous, fp32 or fp64.
        target_C: contiguous.
        stats: the first value of the first row; the three of a row are ``tokens`` apart.
        tokens: T.
    """
    rows, columns = logits_CV.shape
    block = block_of(columns, COLUMNS)
    arguments: dict[str, Tensor | int] = {
        "logits": logits_CV,
        "target": target_C,
        "stats": stats,
        "columns": columns,
        "tokens": tokens,
    }
    constants = {"WIDE": computed(logits_CV.dtype), "BLOCK": block}
    launch(logits_stats_kernel, rows, arguments, constants, warps_of(block))


def gradients(
    logits_CV: Tensor,
    target_C: Tensor,
    log_z_C: Tensor,
    coefficients: Tensor,
    tokens: int,
    grad_CV: Tensor,
) -> None:
    """Write a softmax - b [column = target] of each row.

    Args:
        logits_CV: contiguous, fp32 or fp64.
        target_C: contiguous.
        log_z_C: log of the sum of exp(logit) over the whole vocabulary.
        coefficients: a of the first row; b is ``tokens`` further.
        tokens: T.
        grad_CV: the result, in any dtype; may be ``logits_CV``.
    """
    rows, columns = logits_CV.shape
    block = block_of(columns, COLUMNS)
    arguments: dict[str, Tensor | int] = {
        "logits": logits_CV,
        "target": target_C,
        "log_z": log_z_C,
        "coefficients": coefficients,
        "grad": grad_CV,
        "columns": columns,
        "tokens": tokens,
    }
    launch(logits_grad_kernel, rows, arguments, {"BLOCK": block}, warps_of(block))


def forward(
    x_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """See the reference; ``kept`` is the logits of the last chunk."""
    if not runs_on(x_TH, weight_VH, target_T):
        return reference.forward(x_TH, weight_VH, target_T, scale, chunk_tokens)
    tokens, columns = x_TH.shape[0], weight_VH.shape[0]
    target_T = checked("linear_cross_entropy", target_T, (tokens,), torch.int64)
    size, dtype = chunk_size(tokens, chunk_tokens), result_dtype(x_TH.dtype)
    kept_CV = x_TH.new_empty(size, columns, dtype=dtype)
    stats_3T = x_TH.new_empty(3, tokens, dtype=dtype)
    weight_HV = operand(weight_VH).t()
    for rows in chunks_of(tokens, size):
        kept = kept_CV[: rows.stop - rows.start]
        logits_CV = gemm(kept, operand(x_TH[rows]), weight_HV, alpha=scale)
        statistics(logits_CV, target_T[rows], stats_3T[0, rows.start :], tokens)
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
    """See the reference."""
    if not runs_on(x_TH, weight_VH, kept):
        given = x_TH, weight_VH, target_T, scale, stats_3T, log_z_T, coefficients_2T, kept
        return reference.backward(*given, grad_VH)
    tokens = x_TH.shape[0]
    target_T = checked("linear_cross_entropy", target_T, (tokens,), torch.int64)
    log_z_T = checked("linear_cross_entropy", log_z_T, (tokens,), stats_3T.dtype)
    both_2T = checked("linear_cross_entropy", coefficients_2T, (2, tokens), stats_3T.dtype)
    weight, grad_TH = operand(weight_VH), torch.empty_like(x_TH)
    rounded = kept.new_empty(kept.shape, dtype=x_TH.dtype) if multiplies_halves(x_TH) else kept
    chunks = chunks_of(tokens, kept.shape[0])
    for rows in reversed(chunks):
        logits_CV, grad_CV = (each[: rows.stop - rows.start] for each in (kept, rounded))
        x_CH = operand(x_TH[rows])
        if rows != chunks[-1]:
            gemm(logits_CV, x_CH, weight.t(), alpha=scale)
        gradients(
            logits_CV, target_T[rows], log_z_T[rows], both_2T[0, rows.start :], tokens, grad_CV
        )
        grad_CH = x_CH.new_empty(x_CH.shape, dtype=stats_3T.dtype)
        grad_TH[rows] = gemm(grad_CH, grad_CV, weight, alpha=scale)
        if grad_VH is not None:
            gemm(grad_VH, grad_CV.t(), x_CH, alpha=scale, beta=1.0)
    return grad_TH
