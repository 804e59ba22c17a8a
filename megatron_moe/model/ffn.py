"""The dense feed-forward layer under tensor parallelism, also used as the shared expert.

The input projection holds its halves one after the other: [gate | up] (paper variant) or
[a | b | up] (released), each split over the ranks on its own, so that the gate's halves stay
aligned on every rank.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config.model import FfnVariant


def input_blocks(variant: FfnVariant) -> int:
    """How many blocks of width F the input projection has."""
    return 2 if variant == "swiglu" else 3


def gated_activation(x: Tensor, variant: FfnVariant) -> Tensor:
    """silu(gate) * up, or a * silu(b) * up, of blocks along the last dimension."""
    if variant == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    a, b, up = x.chunk(3, dim=-1)
    return a * F.silu(b) * up


class DenseFFN(torch.nn.Module):
    """[S, B, H] -> [S, B, H] through width F.

    Args:
        config: the engine's configuration.
        variant: which of the two published forms.
        ffn_size: F.
        pgs: process groups; the tensor-parallel one is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        variant: FfnVariant,
        ffn_size: int,
        pgs: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            input_blocks(variant) * ffn_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=pgs.tp,
        )
        self.linear_fc2 = RowParallelLinear(
            ffn_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pgs.tp,
        )

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Apply; under sequence parallelism S is this rank's part of the row."""
        hidden, _ = self.linear_fc1(x_SBH)
        output, _ = self.linear_fc2(gated_activation(hidden, self.variant))
        return output
