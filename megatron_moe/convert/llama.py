"""Hugging Face checkpoints of Llama, read as a dense model: a source for upcycling.

Llama has the same block with three-matrix FFNs, attention scaled by 1/sqrt(d) and half-split rotary
embeddings. One difference is resolved while reading: a tied output matrix is copied, which leaves
the logits as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.config import ModelConfig, RunConfig
from megatron_moe.convert.hf import hf_name
from megatron_moe.convert.hf_files import (
    CONFIG,
    SIZE,
    check_no_extra,
    number,
    open_files,
    query_groups,
    tokenizer_files,
    whole_number,
)
from megatron_moe.convert.model import LogicalModel
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.logical import logical_parameters

_ARCHITECTURE = "LlamaForCausalLM"
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
"""Required values of these fields, where present."""
_IGNORED = "rotary_emb.inv_freq"
"""A constant that older files contain for every layer."""


def is_llama(directory: Path) -> bool:
    """Whether `config.json` of a checkpoint directory names Llama's architecture.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return read_json(directory / CONFIG).get("architectures") == [_ARCHITECTURE]


def read_llama(directory: Path) -> LogicalModel:
    """Read a checkpoint directory with `config.json` and weights.

    Raises:
        UsageError: a file is missing or damaged, or this project has no such model.
    """
    source = directory / CONFIG
    values = read_json(source)
    config = _configuration(values, str(source))
    found = {n: t for n, t in open_files(directory).items() if not n.endswith(_IGNORED)}
    vocab_size = whole_number(values, "vocab_size", str(source), most=SIZE)
    if values.get("tie_word_embeddings") and "model.embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    tensors, used = {}, set()
    for name in logical_parameters(config.model, config.moe, vocab_size):
        theirs = hf_name(name, "stacked")
        if theirs not in found:
            expected = "a checkpoint with all tensors of the model"
            raise Corrupt(str(directory), f"one without {theirs}", expected)
        used.add(theirs)
        tensors[name] = found[theirs]
    check_no_extra(directory, found.keys() - used)
    return LogicalModel(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        tokenizer_files=tokenizer_files(directory),
    )


def _configuration(values: dict[str, Any], source: str) -> RunConfig:
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"{key} in {source}", values[key], repr(only))
    layers = whole_number(values, "num_hidden_layers", source)
    heads = whole_number(values, "num_attention_heads", source)
    groups = query_groups(values, heads, source)
    hidden = whole_number(values, "hidden_size", source, most=SIZE)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=whole_number(values, "intermediate_size", source, most=SIZE),
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=1 if groups == heads else groups,
        kv_channels=whole_number(values, "head_dim", source, max(1, hidden // heads)),
        max_position_embeddings=whole_number(
            values, "max_position_embeddings", source, 2048, most=SIZE
        ),
        rotary_base=_rotary_base(values, source),
        norm_epsilon=number(values, "rms_norm_eps", source, 1e-6),
        ffn_variant="swiglu",
        softmax_scale=None,
    )
    run = RunConfig()
    moe = replace(run.moe, moe_layer_freq=f"[0]*{model.num_layers}")
    return replace(run, model=model, moe=moe)


def _rotary_base(values: dict[str, Any], source: str) -> float:
    """From `rope_parameters` of newer files, or `rope_theta` of older ones."""
    newer = values.get("rope_parameters")
    if not isinstance(newer, Mapping):
        return number(values, "rope_theta", source, 1e4)
    kind = newer.get("rope_type", "default")
    if kind != "default":
        raise CheckpointError(f"rope_type in {source}", kind, "'default'")
    return number(newer, "rope_theta", f"rope_parameters in {source}", 1e4)
