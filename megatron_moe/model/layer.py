"""One transformer layer of OpenMoE, built from Megatron-Core's attention and our feed-forwards.

x += Attn(norm1 x); then a dense layer does x += FFN(norm2 x), and an MoE layer either
x += MoE(norm2 x), x += shared(norm3 x) (released) or x += MoE(norm2 x) + shared(norm2 x) (paper,
eq. 4). Megatron-Core's own layer has one norm and one MLP, hence this one in its block.

Shapes: S sequence (this rank's part under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    get_transformer_layer_offset,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config import ModelConfig, MoEConfig, moe_layer_pattern
from megatron_moe.model.attention import Documents
from megatron_moe.model.ffn import DenseFFN, parameter_device
from megatron_moe.model.implementation import Implementation, recompute_with
from megatron_moe.model.norm import RMSNorm
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.registry import kernels_for
from megatron_moe.platform.release import attention_config


@dataclass
class OpenMoELayerSubmodules:
    """What a layer is built from."""

    self_attention: ModuleSpec
    layers: Implementation
    """Of the feed-forward layers."""


class OpenMoELayer(MegatronModule, BaseTransformerLayer):
    """Layer ``layer_number`` (1-based within its chunk, as Megatron-Core's block counts)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: OpenMoELayerSubmodules,
        model: ModelConfig,
        moe: MoEConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            raise ValueError("OpenMoELayer needs the process groups")
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.layer_number = layer_number + offset
        self.hidden_dropout = model.hidden_dropout
        self.tp_group = pg_collection.tp
        self.pools_documents = moe.moe_router_document_pool is not None
        self.kernels = kernels_for(moe, parameter_device(config).type)
        self.input_layernorm = self._new_norm(model)
        self.self_attention = build_module(
            submodules.self_attention,
            config=attention_config(config, model.qk_layernorm),
            layer_number=self.layer_number,
            pg_collection=pg_collection,
        )
        self.pre_mlp_layernorm = self._new_norm(model)
        self._build_feed_forward(model, moe, pg_collection, submodules.layers)
        self.recompute = recompute_with(config)
        modules = config.recompute_modules if config.recompute_granularity == "selective" else []
        self.recompute_mlp, self.recompute_moe = "mlp" in modules, "moe" in modules
        self.recompute_shared = self.recompute_mlp or "shared_experts" in modules
        self.recompute_norms = "layernorm" in modules

    def _new_norm(self, model: ModelConfig) -> RMSNorm:
        config, kernel = self.config, self.kernels.rms_norm
        return RMSNorm(config, config.hidden_size, model.norm_epsilon, kernel)

    def _build_feed_forward(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        pgs: ProcessGroupCollection,
        layers: Implementation,
    ) -> None:
        config, device = self.config, parameter_device(self.config)
        gate = self.kernels.gated_silu
        pattern = moe_layer_pattern(moe.moe_layer_freq, model.num_layers)
        self.is_moe = pattern[self.layer_number - 1]
        self.shared_norm: RMSNorm | None = None
        self.shared: DenseFFN | None = None
        if not self.is_moe:
            self.ffn = DenseFFN(config, model, model.ffn_hidden_size, pgs, gate, layers)
            return
        self.moe = MoELayer(
            model,
            moe,
            layer_number=self.layer_number - 1,
            num_moe_layers=sum(pattern),
            pgs=pgs,
            sequence_parallel=config.sequence_parallel,
            params_dtype=config.params_dtype,
            device=device,
            make_experts=layers.make_experts(
                model, moe.of_layer(self.layer_number - 1, model.num_layers), config, pgs
            ),
        )
        if moe.moe_shared_expert_intermediate_size is None:
            return
        width = moe.moe_shared_expert_intermediate_size
        self.shared = DenseFFN(config, model, width, pgs, gate, layers)
        if moe.moe_shared_expert_placement == "sequential":
            self.shared_norm = self._new_norm(model)

    def _add(self, residual: Tensor, branch: Tensor) -> Tensor:
        return residual + F.dropout(branch, self.hidden_dropout, self.training)

    def _run(self, module: torch.nn.Module, recompute: bool, *inputs: Tensor | None) -> Tensor:
        if recompute and self.training:
            return self.recompute(module, self.tp_group, *inputs)
        output: Tensor = module(*inputs)
        return output

    def _norm(
        self, norm: RMSNorm, x: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        """The input of a sublayer, which is zero at padding if ``documents`` say where it is.

        Returns:
            The input, and a function to call with the sublayer's output: with recomputation it
            frees the input, until the backward pass has the gradient of that output.
        """

        def run(x: Tensor) -> Tensor:
            normed: Tensor = norm(x)
            return normed if documents is None else documents.without_padding(normed, self.tp_group)

        if not (self.recompute_norms and self.training and torch.is_grad_enabled()):
            return run(x), lambda output: None
        again = tensor_parallel.CheckpointWithoutOutput(fp8=self.config.fp8)
        return again.checkpoint(run, x), again.discard_output_and_register_recompute

    def _feed_forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        normed, free = self._norm(self.pre_mlp_layernorm, x, documents)
        if not self.is_moe:
            output = self._run(self.ffn, self.recompute_mlp, normed)
            free(output)
            return self._add(x, output)
        padding = None if documents is None else documents.padding_of(x, self.tp_group)
        ids = None if documents is None else documents.tokens_of(x, self.tp_group)
        numbers = None
        if documents is not None and self.pools_documents:
            numbers = documents.numbers_of(x, self.tp_group)
        routed = self._routed(normed, padding, ids, numbers)
        free(routed)
        x = self._add(x, routed)
        if self.shared is None or self.shared_norm is None:
            return x
        normed, free = self._norm(self.shared_norm, x, documents)
        output = self._run(self.shared, self.recompute_shared, normed)
        free(output)
        return self._add(x, output)

    def _routed(
        self,
        normed: Tensor,
        padding: Tensor | None,
        ids: Tensor | None,
        numbers: Tensor | None,
    ) -> Tensor:
        """The routed experts, and with them the shared expert if both are of the same input."""
        shared = self.shared if self.shared_norm is None else None
        recomputed = self.training and (self.recompute_moe or self.recompute_shared)
        if shared is not None and self.moe.overlaps and not recomputed:
            routed: Tensor = self.moe(normed, padding, lambda: shared(normed), ids, numbers)
            return routed
        known: tuple[Tensor | None, ...] = () if padding is None else (padding,)
        if ids is not None or numbers is not None:
            known = (padding, None, ids, numbers)
        routed = self._run(self.moe, self.recompute_moe, normed, *known)
        if shared is not None:
            routed = routed + self._run(shared, self.recompute_shared, normed)
        return routed

    def forward(
        self, hidden_states: Tensor, packed_seq_params: Documents | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Apply to [S, B, H]; the second result is Megatron-Core's cross-attention context.

        Args:
            hidden_states: the residual stream, this rank's part of S under sequence parallelism.
            packed_seq_params: positions and documents of the rows, if they have several, and
                padding that is zeroed.
            unused: what Megatron-Core's block passes for other architectures; must be ``None``.
        """
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"OpenMoE layers take no {', '.join(given)}")
        normed, free = self._norm(self.input_layernorm, hidden_states, packed_seq_params)
        attention, _ = self.self_attention(
            normed, attention_mask=None, packed_seq_params=packed_seq_params
        )
        free(attention)
        output = self._feed_forward(self._add(hidden_states, attention), packed_seq_params)
        # The pipeline schedule frees outputs by replacing their storage: views would keep it.
        return make_viewless_tensor(output, output.requires_grad, keep_graph=True), None
