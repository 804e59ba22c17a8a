"""Exported models of every variant, and the reference model of the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config import RunConfig
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.model import LogicalModel
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.convert.cases import CONFIG, VOCAB, model_of

VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "paper": {
        "ffn_variant": "swiglu",
        "softmax_scale": None,
        "untie_embeddings_and_output_weights": False,
        "moe_shared_expert_placement": "parallel",
    },
    "no shared expert": {"moe_shared_expert_intermediate_size": None, "moe_ffn_hidden_size": 8},
    "widths": {
        "moe_ffn_hidden_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "moe_layer_freq": "[1,0,0,1]",
        "moe_router_topk": 3,
    },
    "tied": {"untie_embeddings_and_output_weights": False, "scale_tied_logits": False},
    "grouped": {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2},
    "head norms": {
        "qk_layernorm": True,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "softmax_scale": None,
    },
    "projection norms": {
        "qk_layernorm": True,
        "qk_layernorm_scope": "projection",
        "softmax_scale": None,
    },
    "dense": {"moe_layer_freq": "[0]*4"},
}
"""Changes of `CONFIG`, by name."""


def varied(changes: dict[str, Any]) -> RunConfig:
    """`CONFIG` with changes to either section."""
    model = {key: value for key, value in changes.items() if hasattr(CONFIG.model, key)}
    moe = {key: value for key, value in changes.items() if hasattr(CONFIG.moe, key)}
    assert {**model, **moe} == changes
    return replace(CONFIG, model=replace(CONFIG.model, **model), moe=replace(CONFIG.moe, **moe))


def export(folder: Path, config: RunConfig, layout: Any = "stacked") -> LogicalModel:
    """Write a model of random weights into a new folder."""
    model = model_of(config)
    target = ConversionTarget(format="hf", path=folder, layout=layout)
    write(model, target, lambda _: None)
    return model


def reference_of(model: LogicalModel, dtype: torch.dtype = torch.float32) -> ReferenceOpenMoE:
    """The reference model, without a capacity in evaluation."""
    moe = replace(model.config.moe, moe_eval_capacity_factor=None)
    found = ReferenceOpenMoE(model.config.model, moe, VOCAB, seed=None, dtype=dtype)
    found.load_logical((name, tensor.whole()) for name, tensor in model.tensors.items())
    return found.eval()
