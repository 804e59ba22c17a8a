"""A pipeline chunk of OpenMoE: embedding (first), transformer layers, logits and loss (last)."""

from __future__ import annotations

import copy
import math

from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from fused_kernels.operations import LinearCrossEntropy
from megatron_moe.config import ModelConfig
from megatron_moe.model.attention import documents_of
from megatron_moe.model.loss import LogitsLayer
from megatron_moe.model.norm import RMSNorm


class OpenMoEModel(LanguageModule):
    """The layers of one pipeline stage, or of one of its chunks when interleaved.

    Args:
        config: Megatron-Core's configuration.
        layer_spec: how to build one layer.
        model: our configuration of the dense part.
        vocab_size: padded vocabulary V.
        first: whether this chunk embeds the tokens.
        last: whether this chunk computes logits and loss.
        pgs: process groups.
        loss_kernel: computes the losses.
        logits_chunk_tokens: `--logits-chunk-tokens`.
        vp_stage: number of this chunk on its rank, ``None`` without interleaving.
        norm: how to build the last norm.
        layers_need_tokens: whether the router of expert layers decides by the tokens' ids.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        model: ModelConfig,
        vocab_size: int,
        first: bool,
        last: bool,
        pgs: ProcessGroupCollection,
        loss_kernel: LinearCrossEntropy,
        logits_chunk_tokens: int | None = None,
        vp_stage: int | None = None,
        norm: ModuleSpec | type[RMSNorm] = RMSNorm,
        layers_need_tokens: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pgs)
        self.pre_process, self.post_process, self.vp_stage = first, last, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        self.zeroes_padding = model.zero_padding_activations
        self.layers_need_tokens = layers_need_tokens
        tied = self.share_embeddings_and_output_weights
        if first:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size,
                model.max_position_embeddings,
                position_embedding_type="none",
                tp_group=pgs.tp,
            )
        self.decoder = TransformerBlock(
            config,
            _block(config, layer_spec, norm, vp_stage, pgs),
            pre_process=first,
            post_process=last,
            pg_collection=pgs,
            vp_stage=vp_stage,
        )
        if last:
            self.output_layer = LogitsLayer(
                config.hidden_size,
                vocab_size,
                config=_without_fusion(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=first and tied,
                tp_group=pgs.tp,
            )
            self.output_layer.kernel = loss_kernel
            self.output_layer.chunk = logits_chunk_tokens
            if tied and model.scale_tied_logits:
                # Starts as N(0, 1): right for an embedding, sqrt(H) too large for logits.
                self.output_layer.logits_scale = 1 / math.sqrt(model.hidden_size)
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output; called by the pipeline schedule."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(
        self,
        tokens_BS: Tensor | None,
        labels_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        padding_BS: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            tokens_BS: token ids, needed by the first chunk, or by all with `layers_need_tokens`.
            labels_BS: targets; the last chunk returns logits when it gets none.
            positions_BS: of the rotary embedding, needed by every chunk; `None` counts from the
                start of the row.
            documents_BS: document of each token, within which attention stays; for every chunk.
            padding_BS: not 0 at padding, which is counted apart, and zeroed before every layer and
                the logits with `--zero-padding-activations`; for every chunk.

        Returns:
            The residual stream [S, B, H] for the next stage; or on the last chunk the per-token
            losses [2, B, S] in fp32 (cross entropy, squared log-normaliser), or without labels the
            logits [B, S, V of this rank].
        """
        hidden = self.embedding(tokens_BS, None) if self.pre_process else None
        ids_BS = tokens_BS if self.layers_need_tokens else None
        documents = documents_of(
            positions_BS, documents_BS, padding_BS, self.zeroes_padding, ids_BS
        )
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=documents
        )
        if not self.post_process:
            return hidden
        if documents is not None:
            hidden = documents.without_padding(hidden, self.pg_collection.tp)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        if labels_BS is None:
            logits_SBV, _ = self.output_layer(hidden, weight=weight)
            return logits_SBV.transpose(0, 1).contiguous()
        losses_2SB, _ = self.output_layer(hidden, weight=weight, target_SB=labels_BS.t())
        return losses_2SB.transpose(1, 2).contiguous()


def _without_fusion(config: TransformerConfig) -> TransformerConfig:
    """For the logits, whose gradient is our own; Megatron-Core's layer would demand Apex."""
    found = copy.copy(config)
    found.gradient_accumulation_fusion = False
    return found


def _block(
    config: TransformerConfig,
    spec: ModuleSpec,
    norm: ModuleSpec | type[RMSNorm],
    vp_stage: int | None,
    pgs: ProcessGroupCollection,
) -> TransformerBlockSubmodules:
    count = get_num_layers_to_build(config, vp_stage, pgs.pp.rank())
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm)
