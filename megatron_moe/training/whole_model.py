"""Numbers over the whole model, in which each logical element counts once, on any layout.

Not again for tensor-parallel copies, tied copies on another pipeline stage, or data-parallel
replicas: the norm of the gradient and of the parameters, and the number of zeros in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_moe.platform.release import gradients_for_norm
from megatron_moe.training.optim.build import chained_optimizers
from megatron_moe.training.optim.squares import sum_of_squares


def grad_norm(optimizer: MegatronOptimizer, device: torch.device) -> float:
    """The norm of the whole model's gradient, the same number on every rank.

    Squares are added in blocks (`optim/squares.py`), so that the norm, and with it clipping,
    depends neither on the size of tensors nor on the layout: to 1e-9, for equal gradients. This is
    the one host synchronization of a step. Megatron-Core computes the same quantity, but without
    Apex or Transformer Engine it reads the norm of every gradient back separately.
    """
    total = _sum_over_model(optimizer, device, gradients_for_norm, sum_of_squares)
    return math.sqrt(total.item())


def zeros_in_grad(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """How many elements of the gradient are exactly 0: an fp64 scalar on the device."""
    return _sum_over_model(optimizer, device, gradients_for_norm, _zeros)


def params_square(optimizer: MegatronOptimizer, device: torch.device) -> Tensor:
    """Sum of the squares of all parameters, under bf16 of their fp32 masters: fp64 scalar."""
    return _sum_over_model(optimizer, device, _parameters, sum_of_squares)


def _sum_over_model(
    optimizer: MegatronOptimizer,
    device: torch.device,
    select: Callable[[MegatronOptimizer], list[Tensor]],
    measure: Callable[[Sequence[Tensor]], Tensor],
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in chained_optimizers(optimizer):
        found = torch.zeros_like(total)
        tensors = select(part)
        if tensors:
            found += measure(tensors)
        # Every rank joins, also one without parameters in this part: its group waits for it.
        torch.distributed.all_reduce(found, group=part.get_grad_stats_parallel_group())
        total += found
    return total


def _parameters(part: MegatronOptimizer) -> list[Tensor]:
    """What the optimizer updates, selected as Megatron-Core selects gradients for the norm."""
    group = getattr(part, "tp_group", None)
    return [
        param.detach()
        for param in part.get_parameters()
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, group)
    ]


def _zeros(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.numel() - tensor.count_nonzero() for tensor in tensors]).sum()
