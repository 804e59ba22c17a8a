"""What compiled implementations of the gate share: whole passes made of their steps, and shapes.

Shapes: R rows, M = blocks * F, F.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Step = Callable[[], None]
"""Computes when it is called."""


def whole_forward(step: Callable[[Tensor, int, Tensor], Step], z_RM: Tensor, blocks: int) -> Tensor:
    """h_RF by the step of an implementation, which takes contiguous operands."""
    h_RF = z_RM.new_empty(*z_RM.shape[:-1], z_RM.shape[-1] // blocks)
    step(z_RM.contiguous(), blocks, h_RF)()
    return h_RF


def whole_backward(
    step: Callable[[Tensor, Tensor, int, Tensor, Tensor], Step],
    grad_RF: Tensor,
    z_RM: Tensor,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """grad_RM and h_RF, likewise."""
    grad_RM, h_RF = z_RM.new_empty(z_RM.shape), grad_RF.new_empty(grad_RF.shape)
    step(grad_RF.contiguous(), z_RM.contiguous(), blocks, grad_RM, h_RF)()
    return grad_RM, h_RF


def wide_shape(h_RF: Tensor, blocks: int) -> tuple[int, ...]:
    """The shape of operands of M columns.

    Raises:
        ValueError: there is no gate with so many blocks.
    """
    if blocks not in (2, 3):
        raise ValueError(f"the gate has {blocks} blocks, expected 2 or 3")
    *rows, width = h_RF.shape
    return (*rows, blocks * width)
