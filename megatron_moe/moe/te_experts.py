"""The experts of one rank on Transformer Engine's grouped GEMMs.

The rows of an expert are known before the step (`BufferLayout.fixed`), so the sizes of the GEMMs,
`m_splits`, are constants and the host reads nothing. Megatron-Core's `TEGroupedMLP` reads them from
the device, has two blocks of the input matrix where OpenMoE has two or three, and multiplies by the
router's weights before the second GEMM.

FP8 GEMMs take a multiple of 16, 32 or 128 rows, by the recipe (`ALIGNMENT`). The rows of a local
expert are padded with zeros after the exchange and cut off before the way back: capacity, and so
which tokens drop, does not depend on the recipe. Nor does padding change what FP8 makes of the
other rows: zeros never are the largest value, which a scale is taken from.

Shapes: E experts of this rank, H hidden, F width of an expert on this rank, M = blocks * F, R
buffer rows, N rows of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from fused_kernels.autograd import gated_silu
from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.config.precision import ALIGNMENT
from megatron_moe.moe.exchange import ExpertGroups, size_of
from megatron_moe.moe.experts import ExpertImpl, Experts
from megatron_moe.moe.plan import Plan


class GroupedExperts(Experts):
    """A weight of its own for each expert, and one grouped GEMM over all of them.

    Args:
        model: hidden size and feed-forward variant.
        moe: number and width of experts.
        groups: expert parallelism divides the experts, expert tensor parallelism their width.
        config: Megatron-Core's configuration: type and place of the weights, the FP8 recipe.
        pgs: the `ProcessGroupCollection` that ``groups`` is from.

    Attributes:
        linear_fc1: parameters `weight0`, `weight1`, ..., each [M, H].
        linear_fc2: likewise, each [H, F].
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        groups: ExpertGroups,
        config: TransformerConfig,
        pgs: Any,
    ) -> None:
        super().__init__(model, moe, groups)
        # Recipes with one scale a tensor need the same, whatever their name.
        self.row_multiple = dict(ALIGNMENT).get(config.fp8_recipe, ALIGNMENT["tensorwise"])
        # Sizes are those of all expert-tensor ranks.
        width = self.width * size_of(groups.expt_tp)
        self.linear_fc1 = TEColumnParallelGroupedLinear(
            self.num_local,
            model.hidden_size,
            model.input_blocks * width,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            is_expert=True,
            pg_collection=pgs,
        )
        self.linear_fc2 = TERowParallelGroupedLinear(
            self.num_local,
            width,
            model.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            skip_bias_add=False,
            is_expert=True,
            pg_collection=pgs,
        )
        for linear, dimension in ((self.linear_fc1, 0), (self.linear_fc2, 1)):
            for weight in linear.parameters():
                self.mark_for_megatron(weight, dimension)

    def choose(self, filled_E: Tensor) -> ExpertImpl:
        """Always the grouped GEMM."""
        return ExpertImpl("grouped", "Transformer Engine's grouped GEMM over all slots")

    def forward(self, rows_RH: Tensor, plan: Plan) -> Tensor:
        """Outputs for the rows that arrived, [R, H]: a block of rows from every source rank."""
        rows_ENH = self.by_expert(rows_RH)
        rows = rows_ENH.shape[1]
        multiple = self.row_multiple if FP8GlobalStateManager.is_fp8_enabled() else 1
        padded = -rows % multiple + rows
        if padded != rows:
            rows_ENH = F.pad(rows_ENH, (0, 0, 0, padded - rows))
        splits = [padded] * self.num_local
        hidden_RM, _ = self.linear_fc1(rows_ENH.flatten(0, 1), splits)
        gated_RF = gated_silu(hidden_RM, self.model.input_blocks, plan.kernels.gated_silu)
        out_RH, _ = self.linear_fc2(gated_RF, splits)
        return self.by_source(out_RH.unflatten(0, (self.num_local, padded))[:, :rows])

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill with the model's standard deviations, for a layer outside of a model."""
        for linear, std_of in (
            (self.linear_fc1, self.model.in_std),
            (self.linear_fc2, self.model.out_std),
        ):
            for weight in linear.parameters():
                generator = torch.Generator(weight.device).manual_seed(seed)
                weight.normal_(0.0, std_of(weight.shape[1]), generator=generator)
                seed += 1
