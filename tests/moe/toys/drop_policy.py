"""A drop policy under which the first choices of a group drop first."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.moe.dropping import DROP_POLICIES, Competition


@DROP_POLICIES.register("toy")
def last_first(competition: Competition) -> Tensor:
    """Position order, reversed."""
    experts_GA = competition.experts_GA
    choices = experts_GA.shape[1]
    return torch.arange(choices - 1, -1, -1, device=experts_GA.device).expand_as(experts_GA)
