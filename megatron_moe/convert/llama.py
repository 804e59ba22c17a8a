"""Hugging Face checkpoints of Llama, read as a dense model: a source for upcycling.

Llama has the same block with three-matrix FFNs, attention scaled by 1/sqrt(d) and half-split rotary
embeddings. Two differences are resolved while reading: key and value heads shared by a group of
queries (grouped-query attention) are repeated for each query head, and a tied output matrix is
copied. Neither changes the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.config import ModelConfig, RunConfig
from megatron_moe.convert.hf import hf_name
from megatron_moe.convert.hf_files import (
    CONFIG,
    SIZE,
    check_no_extra,
    number,
    open_files,
    tokenizer_files,
    whole_number,
)
from megatron_moe.convert.model import LazyTensor, LogicalModel
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
    config, groups = _configuration(values, str(source))
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
        shared = groups > 1 and name.endswith(("attention.key.weight", "attention.value.weight"))
        width = config.model.kv_channels
        tensors[name] = _repeated(found[theirs], groups, width) if shared else found[theirs]
    check_no_extra(directory, found.keys() - used)
    return LogicalModel(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        tokenizer_files=tokenizer_files(directory),
    )


def _configuration(values: dict[str, Any], source: str) -> tuple[RunConfig, int]:
    """The configuration, and the number of query heads that share a key head."""
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"{key} in {source}", values[key], repr(only))
    layers = whole_number(values, "num_hidden_layers", source)
    heads = whole_number(values, "num_attention_heads", source)
    shared = whole_number(values, "num_key_value_heads", source, heads)
    hidden = whole_number(values, "hidden_size", source, most=SIZE)
    if heads % shared:
        expected = f"a divisor of num_attention_heads ({heads})"
        raise CheckpointError(f"num_key_value_heads in {source}", shared, expected)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=whole_number(values, "intermediate_size", source, most=SIZE),
        num_attention_heads=heads,
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
    return replace(run, model=model, moe=moe), heads // shared


def _rotary_base(values: dict[str, Any], source: str) -> float:
    """From `rope_parameters` of newer files, or `rope_theta` of older ones."""
    newer = values.get("rope_parameters")
    if not isinstance(newer, Mapping):
        return number(values, "rope_theta", source, 1e4)
    kind = newer.get("rope_type", "default")
    if kind != "default":
        raise CheckpointError(f"rope_type in {source}", kind, "'default'")
    return number(newer, "rope_theta", f"rope_parameters in {source}", 1e4)


def _repeated(tensor: LazyTensor, groups: int, width: int) -> LazyTensor:
    """[heads * width, H] -> [groups * heads * width, H], each head ``groups`` times in a row.

    Query head n of Llama uses key head n // groups, so after repeating it uses key head n.
    """
    shape = (tensor.shape[0] * groups, *tensor.shape[1:])

    def rows(start: int, stop: int) -> Tensor:
        heads = tensor.whole().unflatten(0, (-1, width))
        return heads.repeat_interleave(groups, 0).flatten(0, 1)[start:stop]

    return LazyTensor(shape, tensor.dtype, rows)
