"""Differentiable gather into the buffer and weighted sum out of it, around the kernels.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe.moe.plan import Plan


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, plan: Plan, kernel: ModuleType) -> Tensor:
        ctx.save_for_backward(plan.rows_TK, plan.owned_TK)
        ctx.kernel = kernel
        return kernel.forward(x_TH, plan.source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_RH: Tensor, weights_TK: Tensor, plan: Plan, kernel: ModuleType
    ) -> Tensor:
        saved = (out_RH, weights_TK, plan.rows_TK, plan.owned_TK, plan.source_R)
        ctx.save_for_backward(*saved)
        ctx.kernel = kernel
        return kernel.forward(*saved[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None


def dispatch(x_TH: Tensor, plan: Plan, kernel: ModuleType) -> Tensor:
    """Copy tokens into their rows, [R, H]. The gradient sums over a token's rows."""
    return _Dispatch.apply(x_TH, plan, kernel)


def combine(out_RH: Tensor, weights_TK: Tensor, plan: Plan, kernel: ModuleType) -> Tensor:
    """Sum a token's rows with their weights, [T, H]; dropped choices add nothing."""
    return _Combine.apply(out_RH, weights_TK, plan, kernel)
