"""Kernels as differentiable functions, for callers without an autograd function of their own.

Shapes: R rows, F width of a feed-forward layer, M = blocks * F, W width of a norm, S tokens of a
row, B rows, N heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.operations import GatedSilu, RmsNorm, Rotary


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_RM: Tensor, blocks: int, kernel: GatedSilu) -> Tensor:
        ctx.save_for_backward(z_RM)
        ctx.blocks, ctx.kernel = blocks, kernel
        return kernel.forward(z_RM, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (z_RM,) = ctx.saved_tensors
        # Autograd may pass the same gradient tensor to other functions: it must stay intact.
        grad_RF = grads[0].clone() if ctx.kernel.OVERWRITES_GRADIENT else grads[0]
        return ctx.kernel.gradient(grad_RF, z_RM, ctx.blocks), None, None


def gated_silu(z_RM: Tensor, blocks: int, kernel: GatedSilu) -> Tensor:
    """The gated product h_RF with its gradient; saves only its input for the backward pass.

    Args:
        z_RM: input of the gate.
        blocks: 2 for [gate | up], 3 for [linear | gate | up].
        kernel: the implementation.
    """
    return _GatedSilu.apply(z_RM, blocks, kernel)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float, kernel: RmsNorm) -> Tensor:
        result, inverse = kernel.forward(x, weight_W, eps)
        ctx.save_for_backward(x, weight_W, inverse)
        ctx.kernel = kernel
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None


def rms_norm(x: Tensor, weight_W: Tensor, eps: float, kernel: RmsNorm) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight; saves x and a number for each row, no fp32 copy.

    Args:
        x: [..., W].
        weight_W: the scale.
        eps: added to the mean square.
        kernel: the implementation.
    """
    return _RmsNorm.apply(x, weight_W, eps, kernel)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos: Tensor, sin: Tensor, kernel: Rotary) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        return kernel.forward(x_SBND, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None, None


def rotary(x_SBND: Tensor, cos: Tensor, sin: Tensor, kernel: Rotary) -> Tensor:
    """Rotated queries or keys; saves nothing of ``x_SBND``.

    Args:
        x_SBND: queries or keys.
        cos: [S, D/2] or [S, B, D/2].
        sin: likewise.
        kernel: the implementation.
    """
    return _Rotary.apply(x_SBND, cos, sin, kernel)
