"""Kernels as differentiable functions, for callers without an autograd function of their own.

Shapes: R rows, F width of a feed-forward layer, M = blocks * F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.operations import GatedSilu


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
        return ctx.kernel.backward(grad_RF, z_RM, ctx.blocks)[0], None, None


def gated_silu(z_RM: Tensor, blocks: int, kernel: GatedSilu) -> Tensor:
    """The gated product h_RF with its gradient; saves only its input for the backward pass.

    Args:
        z_RM: input of the gate.
        blocks: 2 for [gate | up], 3 for [linear | gate | up].
        kernel: the implementation.
    """
    return _GatedSilu.apply(z_RM, blocks, kernel)
