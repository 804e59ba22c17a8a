"""Kernels as differentiable functions, for who does not write a larger one around them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_RM: Tensor, blocks: int, kernel: ModuleType) -> Tensor:
        ctx.save_for_backward(z_RM)
        ctx.blocks, ctx.kernel = blocks, kernel
        return kernel.forward(z_RM, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (z_RM,) = ctx.saved_tensors
        # It is not ours: whoever made it may still read it.
        grad_RF = grads[0].clone() if ctx.kernel.OVERWRITES_GRADIENT else grads[0]
        return ctx.kernel.backward(grad_RF, z_RM, ctx.blocks)[0], None, None


def gated_silu(z_RM: Tensor, blocks: int, kernel: ModuleType) -> Tensor:
    """The gated product h_RF with its gradient; keeps only its input for the backward pass.

    Args:
        z_RM: input of the gate.
        blocks: as the kernel has it.
        kernel: a `gated_silu` as `select` gives it.
    """
    return _GatedSilu.apply(z_RM, blocks, kernel)
