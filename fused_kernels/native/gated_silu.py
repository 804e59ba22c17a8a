"""The gate of a feed-forward layer: silu(gate) * up, or linear * silu(gate) * up, in one pass.

As `fused_kernels.reference.gated_silu`, which describes the blocks. Elements of bfloat16 are
computed in fp32 and rounded once.

Shapes: R rows, M = blocks * F, F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.gate_passes import whole_backward, whole_forward, wide_shape
from fused_kernels.native.call import Operand, operation
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import gated_silu as reference

OVERWRITES_GRADIENT = False
"""`backward` leaves its first argument as it is."""


def forward(z_RM: Tensor, blocks: int) -> Tensor:
    """The gated product, h_RF."""
    return whole_forward(forward_step, z_RM, blocks)


def forward_step(z_RM: Tensor, blocks: int, h_RF: Tensor) -> Callable[[], None]:
    """`forward` into ``h_RF`` when the result is called."""
    if not runs_on(z_RM, h_RF):
        return reference.forward_step(z_RM, blocks, h_RF)
    narrow, wide = _operands(h_RF, blocks, [h_RF], [z_RM])
    return operation("gated_silu_forward", h_RF.dtype, [*wide, *narrow], *_sizes(h_RF, blocks))


def forward_fp8(z_RM: Tensor, blocks: int, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised in passes of torch."""
    return quantized(forward(z_RM, blocks), output)


def backward(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and the forward result once more: grad_RM, h_RF."""
    return whole_backward(backward_step, grad_RF, z_RM, blocks)


def gradient(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> Tensor:
    """grad_RM of `backward` alone."""
    if not runs_on(grad_RF, z_RM):
        return reference.gradient(grad_RF, z_RM, blocks)
    grad_RM, grad_RF = z_RM.new_empty(z_RM.shape), grad_RF.contiguous()
    (grad,), (z, dz) = _operands(grad_RF, blocks, [grad_RF], [z_RM.contiguous(), grad_RM])
    operation("gated_silu_gradient", grad_RF.dtype, [grad, z, dz], *_sizes(grad_RF, blocks))()
    return grad_RM


def backward_step(
    grad_RF: Tensor, z_RM: Tensor, blocks: int, grad_RM: Tensor, h_RF: Tensor
) -> Callable[[], None]:
    """`backward` into ``grad_RM`` and ``h_RF`` when the result is called."""
    if not runs_on(grad_RF, z_RM, grad_RM, h_RF):
        return reference.backward_step(grad_RF, z_RM, blocks, grad_RM, h_RF)
    (grad, h), (z, dz) = _operands(h_RF, blocks, [grad_RF, h_RF], [z_RM, grad_RM])
    return operation("gated_silu_backward", h_RF.dtype, [grad, z, dz, h], *_sizes(h_RF, blocks))


def _operands(
    h_RF: Tensor, blocks: int, narrow: list[Tensor], wide: list[Tensor]
) -> tuple[list[Operand], list[Operand]]:
    """Operands of F columns and operands of M, with the shapes and dtypes they must have."""
    all_of_M = wide_shape(h_RF, blocks)
    return (
        [(x, h_RF.shape, h_RF.dtype) for x in narrow],
        [(x, all_of_M, h_RF.dtype) for x in wide],
    )


def _sizes(h_RF: Tensor, blocks: int) -> tuple[int, int, int, int]:
    """Rows, F, blocks, threads."""
    width = h_RF.shape[-1]
    return h_RF.numel() // max(1, width), width, blocks, torch.get_num_threads()
