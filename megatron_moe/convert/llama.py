"""Hugging Face checkpoints of Llama and OLMoE, whose networks are special cases of this one.

They are read, and a model that is such a case is written for the class of `transformers`.

Llama has the same block with three-matrix FFNs, attention scaled by 1/sqrt(d) and half-split rotary
embeddings: a dense model here, and a source for upcycling. OLMoE (Muennighoff et al., arXiv
2409.02060) has Llama's attention with norms over the whole projections of queries and keys, and in
every layer experts without a shared one, whose probabilities are not normalised and never drop.
Tied logits are not scaled there. Source of the fields: the classes of `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.config import ModelConfig, MoEConfig, RunConfig, moe_layer_pattern
from megatron_moe.config.fields import fields_of
from megatron_moe.convert.hf import model_of
from megatron_moe.convert.hf_files import (
    CONFIG,
    SIZE,
    number,
    open_files,
    query_groups,
    rotary_base,
    whole_number,
)
from megatron_moe.convert.model import LogicalModel
from megatron_moe.errors import CheckpointError
from megatron_moe.model.logical import expert_width, softmax_scale

_IGNORED = "rotary_emb.inv_freq"
"""A constant that older files contain for every layer."""


@dataclass(frozen=True)
class Architecture:
    """One architecture of `transformers`.

    Args:
        model_type: of `config.json`.
        only: required values of these fields, where present.
        defaults: values of the class for fields that a file may omit.
        experts: the MoE part and the changes of the dense part, from `config.json` and its path.
        fields: the fields that `only` and Llama's sizes leave out, of a model to be written.
    """

    model_type: str
    only: Mapping[str, Any]
    defaults: Mapping[str, Any]
    experts: Callable[[dict[str, Any], ModelConfig, str], tuple[ModelConfig, MoEConfig]]
    fields: Callable[[MoEConfig], dict[str, Any]]


def architecture_of(directory: Path) -> str | None:
    """The key in `ARCHITECTURES` that `config.json` of a directory names, if any.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    named = read_json(directory / CONFIG).get("architectures")
    return next((name for name in ARCHITECTURES if named == [name]), None)


def read_architecture(directory: Path, name: str) -> LogicalModel:
    """Read a checkpoint directory with `config.json` and weights.

    Args:
        directory: the directory.
        name: its architecture, a key in `ARCHITECTURES`.

    Raises:
        UsageError: a file is missing or damaged, or this project has no such model.
    """
    source = directory / CONFIG
    values = read_json(source)
    config = configuration(values, ARCHITECTURES[name], str(source))
    found = {n: t for n, t in open_files(directory).items() if not n.endswith(_IGNORED)}
    vocab_size = whole_number(values, "vocab_size", str(source), most=SIZE)
    if values.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)  # a second copy, which the classes ignore
    return model_of(directory, found, config, vocab_size)


def configuration(values: dict[str, Any], architecture: Architecture, source: str) -> RunConfig:
    """The configuration that a `config.json` gives.

    Args:
        values: contents of ``source``.
        architecture: the architecture that it names.
        source: the file, for messages.

    Raises:
        UsageError: a field is missing, or has a value that this project does not implement.
    """
    for key, only in architecture.only.items():
        if values.get(key, only) != only:
            expected, reason = repr(only), "this project has no other such model"
            raise CheckpointError(f"{key} in {source}", values[key], expected, reason)
    layers = whole_number(values, "num_hidden_layers", source)
    heads = whole_number(values, "num_attention_heads", source)
    hidden = whole_number(values, "hidden_size", source, most=SIZE)
    groups = query_groups(values, heads, source)
    tied = bool(values.get("tie_word_embeddings"))
    longest, epsilon = "max_position_embeddings", "rms_norm_eps"
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=whole_number(values, "intermediate_size", source, most=SIZE),
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=1 if groups == heads else groups,
        kv_channels=whole_number(values, "head_dim", source, max(1, hidden // heads)),
        max_position_embeddings=whole_number(
            values, longest, source, architecture.defaults[longest], most=SIZE
        ),
        rotary_base=rotary_base(values, source),
        norm_epsilon=number(values, epsilon, source, architecture.defaults[epsilon]),
        ffn_variant="swiglu",
        softmax_scale=None,
        untie_embeddings_and_output_weights=not tied,
        scale_tied_logits=not tied,
    )
    model, moe = architecture.experts(values, model, source)
    return replace(RunConfig(), model=model, moe=moe)


def _dense(
    values: dict[str, Any], model: ModelConfig, source: str
) -> tuple[ModelConfig, MoEConfig]:
    return model, replace(MoEConfig(), moe_layer_freq=f"[0]*{model.num_layers}")


def _olmoe(
    values: dict[str, Any], model: ModelConfig, source: str
) -> tuple[ModelConfig, MoEConfig]:
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        # The class has a query norm of hidden_size channels, whatever the heads.
        expected = f"hidden_size / num_attention_heads ({model.hidden_size}"
        expected += f" / {model.num_attention_heads})"
        raise CheckpointError(f"head_dim in {source}", model.kv_channels, expected)
    moe = MoEConfig(
        num_experts=whole_number(values, "num_experts", source),
        moe_layer_freq=f"[1]*{model.num_layers}",
        moe_router_topk=whole_number(values, "num_experts_per_tok", source),
        moe_shared_expert_intermediate_size=None,
        moe_expert_capacity_factor=None,
        moe_eval_capacity_factor=None,
        moe_router_load_balancing_type="aux_loss",
        # In the class, too, the loss is k when balanced; it is taken over the tokens of all layers
        # together rather than over each layer's.
        moe_aux_loss_coeff=number(values, "router_aux_loss_coef", source, 0.01),
    )
    return replace(model, qk_layernorm=True, qk_layernorm_scope="projection"), moe


def to_architecture(name: str, config: RunConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The contents of `config.json` for a class of `transformers`.

    Args:
        name: a key in `ARCHITECTURES`.
        config: configuration of the run.
        vocab_size: V.
        dtype: dtype of the weights, torch's name.

    Raises:
        CheckpointError: the class computes another model; each setting that differs is listed.
    """
    architecture, ours = ARCHITECTURES[name], _canonical(config)
    model = ours.model
    values = {
        "architectures": [name],
        "model_type": architecture.model_type,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.kv_channels,
        "attention_dropout": model.attention_dropout,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        # Set from the tokenizer that goes with it; the classes assume those of the first models.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **architecture.only,
        **architecture.fields(ours.moe),
    }
    # What is read back is all that the class computes: any other setting must be the same there.
    read = configuration(values, architecture, f"{CONFIG} of {name}")
    faults = [
        f"{field.flag} must be {getattr(theirs, field.name)!r} for {name}"
        f" (got {getattr(mine, field.name)!r})"
        for mine, theirs in ((model, read.model), (ours.moe, read.moe))
        for field in fields_of(type(mine)).values()
        if field.name not in _TRAINING and getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    if ours.moe.has_expert_bias:
        faults.append(f"--moe-router-load-balancing-type must not be quantile_balancing for {name}")
    if faults:
        raise CheckpointError("variant of the model", "another", f"that of {name}", "", faults)
    return values


def _canonical(config: RunConfig) -> RunConfig:
    """One form of settings that describe the same network."""
    model, moe = config.model, config.moe
    groups = model.key_value_heads
    shared = groups != model.num_attention_heads
    untied = model.untie_embeddings_and_output_weights
    plain = softmax_scale(model) == model.kv_channels**-0.5
    model = replace(
        model,
        group_query_attention=shared,
        num_query_groups=groups if shared else 1,
        softmax_scale=None if plain else model.softmax_scale,
        scale_tied_logits=untied or model.scale_tied_logits,
    )
    pattern = moe_layer_pattern(moe.moe_layer_freq, model.num_layers)
    if not any(pattern):
        moe = replace(MoEConfig(), moe_layer_freq=f"[0]*{len(pattern)}")
    elif all(pattern):
        model = replace(model, ffn_hidden_size=expert_width(model, moe))
        moe = replace(moe, moe_layer_freq=f"[1]*{len(pattern)}", moe_ffn_hidden_size=None)
    return replace(config, model=model, moe=moe)


_TRAINING = {
    "hidden_dropout",
    "attention_dropout",
    "init_variance_scale",
    "embedding_init_method_std",
    "router_init_method_std",
    "logit_z_loss_coeff",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_loss_convention",
    "moe_capacity_rule",
    "moe_expert_capacity_factor",
    "moe_min_capacity",
    "moe_capacity_group_size",
    "moe_token_drop_policy",
    "moe_dispatch_impl",
    "moe_expert_impl",
    "moe_dropless_buffer_factor",
    "moe_a2a_overlap_chunks",
    "moe_token_dispatcher_type",
}
"""Settings that change nothing of what the weights compute without a capacity."""


def _olmoe_fields(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": moe.aux_loss_coeffs[0],
    }


_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_OLMOE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "norm_topk_prob": False,
}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        "llama",
        _LLAMA,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        _dense,
        lambda moe: {},
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        _OLMOE,
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        _olmoe,
        _olmoe_fields,
    ),
}
"""By their name in `config.json`."""
