"""A drop policy under which the first choices of a group drop first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_moe.moe.plan import DROP_POLICIES


@DROP_POLICIES.register("toy")
def last_first(experts_GA: Tensor, weights_GA: Callable[[], Tensor]) -> Tensor:
    """Position order, reversed."""
    choices = experts_GA.shape[1]
    return torch.arange(choices - 1, -1, -1, device=experts_GA.device).expand_as(experts_GA)
