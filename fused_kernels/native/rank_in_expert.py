"""For each choice in priority order, how many earlier ones of its group chose the same expert.

As `fused_kernels.reference.rank_in_expert`, by counting.
Shapes: G groups, A choices of a group in priority order, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_kernels.native.call import Operand, operation
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import rank_in_expert as reference


def forward(experts_GA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Ranks within the expert, rank_GA from 0, and the load of each expert, load_GE; int64."""
    if not runs_on(experts_GA):
        return reference.forward(experts_GA, num_experts)
    rank_GA = torch.empty_like(experts_GA, memory_format=torch.contiguous_format)
    load_GE = experts_GA.new_empty(experts_GA.shape[0], num_experts)
    operands: list[Operand] = [
        (experts_GA.contiguous(), experts_GA.shape, torch.int64),
        (rank_GA, experts_GA.shape, torch.int64),
        (load_GE, load_GE.shape, torch.int64),
    ]
    operation("rank_in_expert", None, operands, *experts_GA.shape, num_experts)()
    return rank_GA, load_GE
