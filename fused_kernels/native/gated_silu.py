"""The gate of a feed-forward layer: silu(gate) * up, or linear * silu(gate) * up, in one pass.

As `fused_kernels.reference.gated_silu`, which says what the blocks are. Elements of bfloat16 are
computed with in fp32 and rounded once.
Shapes: R rows, M = blocks * F, F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_kernels.native.library import operation, runs_on
from fused_kernels.reference import gated_silu as reference

OVERWRITES_GRADIENT = False
"""`backward` leaves its first argument as it is."""


def forward(z_RM: Tensor, blocks: int) -> Tensor:
    """The gated product, h_RF."""
    h_RF = z_RM.new_empty(*z_RM.shape[:-1], z_RM.shape[-1] // blocks)
    forward_step(z_RM.contiguous(), blocks, h_RF)()
    return h_RF


def forward_step(z_RM: Tensor, blocks: int, h_RF: Tensor) -> Callable[[], None]:
    """`forward` into ``h_RF``, to be done later."""
    if not runs_on(z_RM, h_RF):
        return reference.forward_step(z_RM, blocks, h_RF)
    sizes = _sizes(h_RF, blocks)
    return operation("gated_silu_forward", h_RF.dtype, z_RM, h_RF, *sizes)


def backward(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and the forward result once more: grad_RM, h_RF."""
    grad_RM, h_RF = z_RM.new_empty(z_RM.shape), grad_RF.new_empty(grad_RF.shape)
    backward_step(grad_RF.contiguous(), z_RM.contiguous(), blocks, grad_RM, h_RF)()
    return grad_RM, h_RF


def backward_step(
    grad_RF: Tensor, z_RM: Tensor, blocks: int, grad_RM: Tensor, h_RF: Tensor
) -> Callable[[], None]:
    """`backward` into ``grad_RM`` and ``h_RF``, to be done later."""
    if not runs_on(grad_RF, z_RM, grad_RM, h_RF):
        return reference.backward_step(grad_RF, z_RM, blocks, grad_RM, h_RF)
    tensors = grad_RF, z_RM, grad_RM, h_RF
    return operation("gated_silu_backward", h_RF.dtype, *tensors, *_sizes(h_RF, blocks))


def _sizes(h_RF: Tensor, blocks: int) -> tuple[int, int, int, int]:
    """Rows, F, blocks, threads."""
    width = h_RF.shape[-1]
    return h_RF.numel() // max(1, width), width, blocks, torch.get_num_threads()
