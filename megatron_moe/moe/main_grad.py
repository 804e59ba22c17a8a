"""Gradients that a backward pass adds to Megatron-Core's buffer itself, by its protocol.

Megatron-Core's data-parallel wrapper gives a weight `main_grad`, its part of the gradient buffer,
and `grad_added_to_main_grad`. An autograd function that has added its gradient there sets the
second to true and returns a tensor that the wrapper's hook does not read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The buffer of a weight's gradient; `None` if Megatron-Core would not clear and read it."""
    main: Tensor | None = getattr(weight, "main_grad", None)
    return None if getattr(weight, "grad_added_to_main_grad", None) is None else main


def added_to_main_grad(weight: Tensor) -> Tensor:
    """Note that the gradient is in `main_grad`; returns what autograd gets for the weight.

    It is uninitialized, but for a tied embedding, whose gradient is read (`zero_out_wgrad`). It has
    memory of its own until the wrapper's hook discards it: if it shared the buffer's, autograd
    would add the next gradient to the buffer wherever no hook discards the first.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    tied = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if tied else torch.empty_like(weight)
