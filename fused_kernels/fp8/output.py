"""FP8 values and scales as the result of an operation, for the GEMM that reads it.

An operation that writes FP8 moves half the bytes of one in bf16, and the GEMM needs no pass of its
own to quantise. What it writes is defined by composition: the result, rounded to the dtype of the
operands as without FP8, and then quantised by `rules`. A scale from the tensor's own largest value
(recipe `tensorwise`) is not among the choices: it is known only after all values are.

Shapes: R rows, F columns, G parts of R / G rows each, one an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fused_kernels.fp8 import rules
from fused_kernels.fp8.rules import BLOCK, MX_BLOCK

Scaling = Literal["given", "blockwise", "mxfp8"]


@dataclass(frozen=True, kw_only=True)
class Fp8Output:
    """How a result is quantised.

    Args:
        dtype: FP8 type.
        scaling: `given`: by ``scale``, values beyond the range saturate; `blockwise`: a power of
            two for 1 x 128 elements; `mxfp8`: one, E8M0, for 1 x 32.
        scale: of `given`: fp32 [G], for each of G equal parts of the rows.
    """

    dtype: torch.dtype
    scaling: Scaling
    scale: Tensor | None = None

    @property
    def block(self) -> int:
        """Columns of one scale; 0 for `given`."""
        return {"given": 0, "blockwise": BLOCK, "mxfp8": MX_BLOCK}[self.scaling]

    def parts(self, rows: int) -> Tensor:
        """``scale``, checked against a number of rows.

        Raises:
            ValueError: there is none, or it does not divide the rows.
        """
        if self.scale is None or self.scale.dim() != 1 or rows % max(1, self.scale.numel()):
            found = None if self.scale is None else tuple(self.scale.shape)
            raise ValueError(f"scale must be [G], with G a divisor of {rows} rows (got {found})")
        return self.scale


@dataclass(frozen=True, kw_only=True)
class Fp8Rows:
    """A quantised result.

    Args:
        values: [R, F] in FP8.
        factors: what values are multiplied by: `given` fp32 [G]; `blockwise` fp32 [R, F / 128];
            `mxfp8` exponents uint8 [R, F / 32], of 2^(exponent - 127). Rounded up.
        amax: of `given`: fp32 [G], the largest magnitude of each part before it was quantised.
    """

    values: Tensor
    factors: Tensor
    amax: Tensor | None = None

    def dequantized(self) -> Tensor:
        """[R, F] in fp32."""
        if self.amax is not None:
            parts = self.values.unflatten(0, (self.factors.shape[0], -1))
            return rules.dequantized(parts, self.factors[:, None, None]).flatten(0, 1)
        block = MX_BLOCK if self.factors.dtype == torch.uint8 else BLOCK
        return rules.dequantized(self.values, self.factors, block=block)


def quantized(x_RF: Tensor, output: Fp8Output) -> Fp8Rows:
    """The definition of every operation's FP8 result, in plain torch.

    Raises:
        ValueError: `given` without a scale that fits.
    """
    if output.scaling == "mxfp8":
        values, factors = rules.mxfp8(x_RF, output.dtype)
        return Fp8Rows(values=values, factors=factors)
    if output.scaling == "blockwise":
        values, factors = rules.per_block(x_RF, output.dtype)
        return Fp8Rows(values=values, factors=factors)
    scale = output.parts(x_RF.shape[0])
    x_GNF = x_RF.view(scale.numel(), x_RF.shape[0] // scale.numel(), x_RF.shape[1])
    values, factors = rules.per_tensor(x_GNF, output.dtype, scale[:, None, None])
    amax = rules.amax_of(x_GNF).flatten()
    return Fp8Rows(values=values.flatten(0, 1), factors=factors.flatten(), amax=amax)
