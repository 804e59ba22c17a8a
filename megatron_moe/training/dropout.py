"""Dropout that changes while a model trains."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

from megatron_moe.config import ModelConfig
from megatron_moe.model.attention import RotaryCoreAttention
from megatron_moe.model.layer import OpenMoELayer
from megatron_moe.model.openmoe import OpenMoEModel


def set_dropout(chunks: Sequence[OpenMoEModel], model: ModelConfig) -> None:
    """Let everything that drops do so as `build_model` would have built it.

    Args:
        chunks: the model chunks of this rank, without wrappers.
        model: `hidden_dropout` (embedding and residual branches) and `attention_dropout`.
    """
    for chunk in chunks:
        chunk.config.hidden_dropout = model.hidden_dropout
        chunk.config.attention_dropout = model.attention_dropout
        for module in chunk.modules():
            if isinstance(module, OpenMoELayer):
                module.hidden_dropout = model.hidden_dropout
            elif isinstance(module, RotaryCoreAttention):
                module.dropout = model.attention_dropout
            elif isinstance(module, LanguageModelEmbedding):
                module.embedding_dropout.p = model.hidden_dropout
