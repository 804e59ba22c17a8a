"""The sum over a token's kept choices of the buffer rows that they name, weighted or not.

The forward pass of combine and the backward pass of dispatch.
Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.triton.launch import block_of, computed, launch, warps_of

COLUMNS = 2048
"""Of a row that a program sums at once: 16 bytes of bf16 for each thread of 4 warps, twice."""


@triton.jit
def sum_rows_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    kept: tl.tensor,
    out: tl.tensor,
    hidden: tl.tensor,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for each token."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < hidden
        total = tl.zeros((BLOCK,), WIDE)
        for k in tl.static_range(CHOICES):
            # A choice that is dropped names any row: that row is not even read.
            keeps = tl.load(kept + token * CHOICES + k)
            row = tl.load(rows + token * CHOICES + k)
            found = tl.load(values + row * hidden + column, mask=inside & keeps, other=0.0)
            if WEIGHTED:
                weight = tl.load(weights + token * CHOICES + k, mask=keeps, other=0.0)
                total += found.to(WIDE) * weight.to(WIDE)
            else:
                total += found.to(WIDE)
        tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(
    values_RH: Tensor, weights_TK: Tensor | None, choices: tuple[Tensor, Tensor]
) -> Tensor:
    """[T, H] in the dtype of ``values_RH``; zero for a token without a kept choice.

    Args:
        values_RH: contiguous.
        weights_TK: contiguous factors; `None` for ones.
        choices: contiguous rows and kept, [T, K] each.
    """
    rows_TK, kept_TK = choices
    (tokens, topk), hidden = rows_TK.shape, values_RH.shape[1]
    out_TH = values_RH.new_empty(tokens, hidden)
    block = block_of(hidden, COLUMNS)
    constants: dict[str, Any] = {
        "CHOICES": topk,
        "WEIGHTED": weights_TK is not None,
        "WIDE": computed(values_RH.dtype),
        "BLOCK": block,
    }
    arguments: dict[str, Tensor | int] = {
        "values": values_RH,
        "weights": values_RH if weights_TK is None else weights_TK,
        "rows": rows_TK,
        "kept": kept_TK,
        "out": out_TH,
        "hidden": hidden,
    }
    launch(sum_rows_kernel, tokens, arguments, constants, warps_of(block))
    return out_TH
