"""Matrix products with a result in fp32, whatever the operands are.

Tensor cores multiply bf16 and fp16 operands exactly and add the products in fp32; with `out_dtype`
that sum is the result, so no operand is copied to fp32. Only torch's CUDA build has it. Elsewhere,
and for fp32 and fp64 operands, operands and result have the same dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.addmm.overloads()


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a product of operands with this dtype: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def multiplies_halves(x: Tensor) -> bool:
    """Whether `gemm` takes this tensor as it is, although it has 16 bits an element."""
    return x.is_cuda and x.dtype in _HALF and _HAS_OUT_DTYPE


def operand(x: Tensor) -> Tensor:
    """``x`` as `gemm` takes it: itself, or a copy in fp32 where 16 bits are not multiplied."""
    return x if multiplies_halves(x) else x.to(result_dtype(x.dtype))


def gemm(
    out: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Write beta out + alpha left right into ``out``, and return it.

    Args:
        out: [M, N] in `result_dtype`; not read if ``beta`` is 0, so it may be uninitialized.
        left: [M, K], from `operand`.
        right: [K, N], from `operand`, in the dtype of ``left``.
        alpha: factor of the product.
        beta: factor of what ``out`` holds.
    """
    if multiplies_halves(left):
        if (alpha, beta) == (1.0, 0.0):
            return torch.mm(left, right, out_dtype=torch.float32, out=out)
        return torch.addmm(
            out, left, right, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out
        )
    # Not `addmm_`, which torch's FLOP counter does not know.
    return torch.addmm(out, left, right, alpha=alpha, beta=beta, out=out)
