"""The dense feed-forward layer under tensor parallelism, also used as the shared expert.

The input projection holds its blocks side by side: [gate | up] (paper variant) or [a | b | up]
(released), each split over the ranks on its own, so that every rank has matching columns of all
blocks.

Shapes: S sequence, B batch, H hidden, F feed-forward width.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from fused_kernels.autograd import gated_silu
from fused_kernels.operations import GatedSilu
from megatron_moe.config import ModelConfig
from megatron_moe.model.implementation import Implementation


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron-Core creates the parameters of a model with this configuration."""
    return torch.device("cpu" if config.use_cpu_initialization else "cuda")


class DenseFFN(torch.nn.Module):
    """[S, B, H] -> [S, B, H] through width F.

    Args:
        config: Megatron-Core's configuration.
        model: which of the two published forms.
        ffn_size: F.
        pgs: process groups; the tensor-parallel one is used.
        gate: the kernel.
        layers: whose linear layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        ffn_size: int,
        pgs: ProcessGroupCollection,
        gate: GatedSilu,
        layers: Implementation,
    ) -> None:
        super().__init__()
        self.blocks, self.gate = model.input_blocks, gate
        self.linear_fc1 = layers.column(
            config.hidden_size,
            self.blocks * ffn_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=pgs.tp,
        )
        self.linear_fc2 = layers.row(
            ffn_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=pgs.tp,
        )

    def forward(self, x_SBH: Tensor) -> Tensor:
        """Apply; under sequence parallelism S is this rank's part of the row."""
        hidden, _ = self.linear_fc1(x_SBH)
        gated = gated_silu(hidden.flatten(0, 1), self.blocks, self.gate)
        gated = gated.view(*hidden.shape[:2], -1)
        output, _ = self.linear_fc2(gated)
        return output
