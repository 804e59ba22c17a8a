"""The gate of a feed-forward layer: silu(gate) * up, or linear * silu(gate) * up.

Columns of the input are blocks of equal width F: [gate | up] in the three-matrix layer (SwiGLU,
Shazeer, arXiv 2002.05202) and [linear | gate | up] in the four-matrix one of the released OpenMoE,
whose gate matrix is [a | b] with a linear and b under silu.
Shapes: R rows, M = blocks * F, F.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows, quantized
from fused_kernels.row_blocks import row_blocks

OVERWRITES_GRADIENT = True
"""`backward` uses the memory of its first argument for intermediate results."""


def forward(z_RM: Tensor, blocks: int) -> Tensor:
    """The gated product.

    Args:
        z_RM: input of the gate.
        blocks: 2 for [gate | up], 3 for [linear | gate | up].

    Returns:
        h_RF.
    """
    h_RF = z_RM.new_empty(*z_RM.shape[:-1], z_RM.shape[-1] // blocks)
    forward_step(z_RM, blocks, h_RF)()
    return h_RF


def forward_step(z_RM: Tensor, blocks: int, h_RF: Tensor) -> Callable[[], None]:
    """`forward` into ``h_RF`` when the result is called; its views are made at once."""
    parts = [(z.chunk(blocks, dim=-1), h) for z, h in row_blocks(h_RF.shape[-1], z_RM, h_RF)]

    def step() -> None:
        for (*linear, gate, up), h in parts:
            torch.ops.aten.silu.out(gate, out=h)
            for factor in (*linear, up):
                h.mul_(factor)

    return step


def forward_fp8(z_RM: Tensor, blocks: int, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised.

    Args:
        z_RM: [R, M], as in `forward`.
        blocks: as in `forward`.
        output: FP8 type and scales.

    Returns:
        FP8 values of h [R, F], with their factors.
    """
    return quantized(forward(z_RM, blocks), output)


def backward(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and the forward result once more (cheaper than keeping it).

    Args:
        grad_RF: gradient of h; **overwritten**.
        z_RM: as in `forward`.
        blocks: as in `forward`.

    Returns:
        grad_RM, h_RF.
    """
    grad_RM, h_RF = torch.empty_like(z_RM), torch.empty_like(grad_RF)
    backward_step(grad_RF, z_RM, blocks, grad_RM, h_RF)()
    return grad_RM, h_RF


def gradient(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> Tensor:
    """The gradient of the input alone: h exists for a few rows at a time.

    Args:
        grad_RF: gradient of h; **overwritten**.
        z_RM: as in `forward`.
        blocks: as in `forward`.

    Returns:
        grad_RM, equal to that of `backward`.
    """
    grad_RM = torch.empty_like(z_RM)
    for grad, z, dz in row_blocks(grad_RF.shape[-1], grad_RF, z_RM, grad_RM):
        backward_step(grad, z, blocks, dz, torch.empty_like(grad))()
    return grad_RM


def backward_step(
    grad_RF: Tensor, z_RM: Tensor, blocks: int, grad_RM: Tensor, h_RF: Tensor
) -> Callable[[], None]:
    """`backward` into ``grad_RM`` and ``h_RF`` when the result is called, which overwrites
    ``grad_RF``; its views are made at once.
    """
    parts = [
        (grad, z.chunk(blocks, dim=-1), dz.chunk(blocks, dim=-1), h)
        for grad, z, dz, h in row_blocks(h_RF.shape[-1], grad_RF, z_RM, grad_RM, h_RF)
    ]

    def step() -> None:
        for grad, (*linear, gate, up), (*d_linear, d_gate, d_up), h in parts:
            torch.ops.aten.silu.out(gate, out=h)
            torch.mul(grad, h, out=d_up)
            for factor, d_factor in zip(linear, d_linear, strict=True):
                torch.mul(d_up, up, out=d_factor)
                d_up.mul_(factor)
                h.mul_(factor)
                grad.mul_(factor)
            h.mul_(up)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=d_gate)

    return step
