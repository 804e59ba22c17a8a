"""`config.json` of OpenMoE in the Hugging Face layout, to and from `RunConfig`.

The released files name the architecture `OpenMoeForCausalLM` with `model_type` llama, whose fields
they extend. A model of the released variant is written the same way, for every program that reads
the released files. Any other has the `model_type` openmoe and the fields of `_own_fields`, which
the exported modelling file reads (`modeling/`), and no `moe_layer_interval`, without which the
public ports stop. Settings without a field (capacity rule, group size, ...) are stored under
`megatron_moe`, which other readers ignore. Source of the fields: the published `config.json` files
and the two public PyTorch ports.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig, moe_layer_pattern
from megatron_moe.convert.hf_files import (
    SIZE,
    number,
    query_groups,
    rotary_base,
    whole_number,
)
from megatron_moe.convert.modeling import AUTO_MAP
from megatron_moe.errors import CheckpointError

OURS = "megatron_moe"
"""Field with the settings of this project."""
_ARCHITECTURES = ("OpenMoeForCausalLM", "HFOpenMoeForCausalLM")
"""Ours and the released one; that of the port with unstacked experts, whose type is openmoe."""
_PAD, _EOS = 0, 1
_GATES = {"swiglu": "gated-swiglu", "silu": "swiglu"}
"""`--ffn-variant` by `hidden_act`. `swiglu` there splits the gate in two: four matrices."""
OLDER_NAMES = {
    "topk": "router_topk",
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
    "noisy_policy": "router_noisy_policy",
    "drop_tks": "router_drop_tks",
    "gated": "mlp_gated",
}
"""Present name of each field that the first published 8B file names otherwise."""


def interval_pattern(layers: int, interval: int) -> str:
    """`--moe-layer-freq` of OpenMoE: layer i, from 0, is MoE if (i + 1) % interval == 0."""
    whole, rest = divmod(layers, interval)
    pattern = f"([0]*{interval - 1}+[1])*{whole}"
    return f"{pattern}+[0]*{rest}" if rest else pattern


def to_hf(
    config: RunConfig, vocab_size: int, dtype: str, layout: str = "stacked"
) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
        config: configuration of the run.
        vocab_size: V.
        dtype: dtype of the weights, torch's name.
        layout: layout of the experts.

    Raises:
        CheckpointError: the layout cannot represent this model.
    """
    _check_expressible(config)
    own = _own_fields(config)
    acts = {variant: act for act, variant in _GATES.items()}
    model = config.model
    values = {
        "architectures": [_ARCHITECTURES[0]],
        "auto_map": AUTO_MAP,
        "model_type": "openmoe" if own else "llama",
        "torch_dtype": dtype,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.kv_channels,
        "hidden_act": acts[model.ffn_variant],
        "attention_bias": False,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": vocab_size,
        "pad_token_id": _PAD,
        "bos_token_id": _PAD,
        "eos_token_id": _EOS,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "expert_layout": layout,
        "moe_capacity": "dropless",
    }
    ours = {section: config.to_dict()[section] for section in ("model", "moe")}
    return {**values, **_dropouts(model), **_expert_fields(config), **own, OURS: ours}


def _dropouts(model: ModelConfig) -> dict[str, Any]:
    return {"attention_dropout": model.attention_dropout, "dropout_rate": model.hidden_dropout}


def _expert_fields(config: RunConfig) -> dict[str, Any]:
    """The published fields of the experts, and those of the ports' own features, at their defaults.

    The ports read each of the latter without a default of their own.
    """
    model, moe = config.model, config.moe
    layers = sum(moe_layer_pattern(moe.moe_layer_freq, model.num_layers))
    (balance, *_), router_z = moe.openmoe_coefficients(layers)
    return {
        "num_experts": moe.num_experts,
        "moe_layer_interval": _interval(config),
        "mlp_gated": True,
        "router_topk": moe.moe_router_topk,
        "router_capacity_factor_train": moe.moe_expert_capacity_factor or 1.25,
        "router_capacity_factor_eval": moe.moe_eval_capacity_factor or 2.0,
        "router_min_capacity": moe.moe_min_capacity,
        "router_noisy_policy": None,
        "router_drop_tks": moe.moe_eval_capacity_factor is not None,
        "router_aux_loss_factor": balance,
        "router_z_loss_factor": router_z,
        "z_loss_factor": model.logit_z_loss_coeff,
        "label_smoothing": 0.0,
        "expert_parallel": None,
        "enable_load_balance": False,
        "load_balance_tolerance": 0.1,
        "load_balance_beam_width": 8,
        "load_balance_group_swap_factor": 0.4,
        "enable_kernel": False,
        "enable_comm_overlap": False,
        "enable_hierarchical_alltoall": False,
    }


def _own_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of a model that is not of the released variant, which else has none.

    `moe_layer_interval` is null then: the ports, which have no other variant, fail at it.
    """
    model, moe = config.model, config.moe
    width, shared = model.ffn_hidden_size, moe.moe_shared_expert_intermediate_size
    released = (
        model.ffn_variant == "gated-swiglu"
        and model.softmax_scale == 1.0
        and not model.qk_layernorm
        and model.untie_embeddings_and_output_weights
        and model.scale_tied_logits
        and moe.moe_shared_expert_placement == "sequential"
        and shared == width
        and (moe.moe_ffn_hidden_size or width) == width
        and _interval(config) is not None
    )
    if released:
        return {}
    return {
        "softmax_scale": model.softmax_scale,
        "scale_tied_logits": model.scale_tied_logits,
        "qk_layernorm": model.qk_layernorm,
        "qk_layernorm_scope": model.qk_layernorm_scope,
        "moe_layer_interval": None,
        "moe_layers": list(config.moe_layers),
        "moe_intermediate_size": moe.moe_ffn_hidden_size or width,
        "shared_expert_intermediate_size": shared or 0,
        "shared_expert_placement": moe.moe_shared_expert_placement,
    }


def _interval(config: RunConfig) -> int | None:
    """N if the MoE layers are those i with (i + 1) % N == 0."""
    pattern = moe_layer_pattern(config.moe.moe_layer_freq, config.model.num_layers)
    interval = pattern.index(True) + 1 if True in pattern else len(pattern) + 1
    regular = tuple((i + 1) % interval == 0 for i in range(len(pattern)))
    return interval if pattern == regular else None


_HAS_NO_EFFECT = {
    "init_variance_scale",
    "embedding_init_method_std",
    "router_init_method_std",
    "init_method_std",
    "moe_input_jitter_eps",
    "zero_padding_activations",
    "moe_ignore_padding_tokens",
    "moe_target_drop_rate",
    "moe_capacity_factor_range",
    "moe_dispatch_impl",
    "moe_expert_impl",
    "moe_dropless_buffer_factor",
    "moe_a2a_overlap_chunks",
    "moe_token_dispatcher_type",
}
"""Settings that change nothing of a trained model's results; of padding, which the exported file
leaves out, nothing at other positions."""
_EXPRESSED = {
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "qk_layernorm",
    "qk_layernorm_scope",
    "max_position_embeddings",
    "rotary_base",
    "norm_epsilon",
    "ffn_variant",
    "softmax_scale",
    "untie_embeddings_and_output_weights",
    "scale_tied_logits",
    "attention_dropout",
    "hidden_dropout",
    "logit_z_loss_coeff",
    "num_experts",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_placement",
    "moe_capacity_rule",
    "moe_expert_capacity_factor",
    "moe_eval_capacity_factor",
    "moe_min_capacity",
    "moe_capacity_group_size",
    "moe_token_drop_policy",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_loss_convention",
}
"""Settings that the exported modelling file computes with."""


def _check_expressible(config: RunConfig) -> None:
    """Require every other setting at its default: readers of the layout assume it.

    A setting that is added later belongs to neither set, so it is an error here until the exported
    modelling file computes it.
    """
    faults = [
        f"--{field.name.replace('_', '-')} must be {field.default!r} for the Hugging Face layout "
        f"(got {getattr(section, field.name)!r})"
        for section in (config.model, config.moe)
        for field in fields(section)
        if field.name not in _EXPRESSED | _HAS_NO_EFFECT
        and field.default is not MISSING
        and getattr(section, field.name) != field.default
    ]
    policy = config.moe.moe_token_drop_policy
    if policy not in ("position", "probs"):
        faults.append(
            "--moe-token-drop-policy must be position or probs for the Hugging Face layout "
            f"(got {policy!r})"
        )
    kinds = config.moe.load_balancing_types
    if len(kinds) > 1 or kinds[0] not in ("seq_aux_loss", "aux_loss", "group_aux_loss", "none"):
        faults.append(
            "--moe-router-load-balancing-type must be one of seq_aux_loss, aux_loss, group_aux_loss"
            f" and none for the Hugging Face layout (got {' '.join(kinds)})"
        )
    if faults:
        expected = "one that the exported modelling file computes"
        raise CheckpointError("variant of the model", "another", expected, "", faults)


def from_hf(values: dict[str, Any], source: str) -> tuple[RunConfig, int]:
    """Configuration and vocabulary size from `config.json`.

    Args:
        values: contents of ``source``.
        source: the file, for messages.

    Raises:
        UsageError: a field is missing or has a value that this project does not implement.
    """
    values = {OLDER_NAMES.get(name, name): value for name, value in values.items()}
    _check_known(values, source)
    run = RunConfig()
    layers = whole_number(values, "num_hidden_layers", source)
    width = whole_number(values, "intermediate_size", source, most=SIZE)
    heads = whole_number(values, "num_attention_heads", source)
    groups = query_groups(values, heads, source)
    scale = number(values, "softmax_scale", source, 1.0) if _has(values, "softmax_scale") else None
    model = ModelConfig(
        num_layers=layers,
        hidden_size=whole_number(values, "hidden_size", source, most=SIZE),
        ffn_hidden_size=width,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=1 if groups == heads else groups,
        kv_channels=whole_number(values, "head_dim", source),
        max_position_embeddings=whole_number(
            values, "max_position_embeddings", source, 2048, most=SIZE
        ),
        rotary_base=rotary_base(values, source),
        norm_epsilon=number(values, "rms_norm_eps", source, 1e-6),
        ffn_variant=_GATES[values["hidden_act"]],  # type: ignore[arg-type]
        qk_layernorm=values.get("qk_layernorm", False),
        qk_layernorm_scope=values.get("qk_layernorm_scope", "head"),
        softmax_scale=scale,
        untie_embeddings_and_output_weights=not values.get("tie_word_embeddings"),
        scale_tied_logits=values.get("scale_tied_logits", True),
        zero_padding_activations=True,  # as released
    )
    moe = _experts(values, model, source)
    if OURS in values:
        model, moe = _with_ours(values, model, moe, source)
    return replace(run, model=model, moe=moe), whole_number(values, "vocab_size", source, most=SIZE)


def _has(values: dict[str, Any], key: str) -> bool:
    """Whether a field whose null has a meaning is absent or another value."""
    return key not in values or values[key] is not None


def _experts(values: dict[str, Any], model: ModelConfig, source: str) -> MoEConfig:
    width = model.ffn_hidden_size
    shared: int | None = width
    if values.get("shared_expert_intermediate_size") == 0:
        shared = None
    elif shared is not None:
        shared = whole_number(values, "shared_expert_intermediate_size", source, width, most=SIZE)
    expert = whole_number(values, "moe_intermediate_size", source, width, most=SIZE)
    drops = bool(values.get("router_drop_tks", True))
    return MoEConfig(
        num_experts=whole_number(values, "num_experts", source),
        moe_layer_freq=_pattern(values, model.num_layers, source),
        moe_router_topk=whole_number(values, "router_topk", source),
        moe_ffn_hidden_size=None if expert == width else expert,
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_placement=values.get("shared_expert_placement", "sequential"),
        moe_expert_capacity_factor=number(values, "router_capacity_factor_train", source, 1.25),
        moe_eval_capacity_factor=(
            number(values, "router_capacity_factor_eval", source, 2.0) if drops else None
        ),
        moe_min_capacity=whole_number(values, "router_min_capacity", source, 4),
        moe_ignore_padding_tokens=False,  # as released, like the next
        moe_router_load_balancing_type="group_aux_loss",
        moe_aux_loss_coeff=number(values, "router_aux_loss_factor", source, 0.01),
        moe_z_loss_coeff=number(values, "router_z_loss_factor", source, 1e-4),
    )


def _pattern(values: dict[str, Any], layers: int, source: str) -> str:
    """`--moe-layer-freq`, from the interval or from the list of layers."""
    listed = values.get("moe_layers")
    if listed is None:
        return interval_pattern(layers, whole_number(values, "moe_layer_interval", source))
    if not isinstance(listed, list) or not all(
        type(layer) is int and 0 <= layer < layers for layer in listed
    ):
        expected = f"a list of layers from 0 to {layers - 1}"
        raise CheckpointError(f"moe_layers in {source}", listed, expected)
    return str([int(layer in listed) for layer in range(layers)]).replace(" ", "")


_MEANINGS = {
    "architectures": tuple([name] for name in _ARCHITECTURES),
    "hidden_act": tuple(_GATES),
    "mlp_gated": (True,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False, True),
    "scale_tied_logits": (True, False),
    "qk_layernorm": (False, True),
    "qk_layernorm_scope": ("head", "projection"),
    "shared_expert_placement": ("sequential", "parallel"),
    "router_noisy_policy": (None,),
}
"""Implemented values of these fields. An absent field, except `hidden_act`, means the same."""


def _check_known(values: dict[str, Any], source: str) -> None:
    for key, known in _MEANINGS.items():
        if key == "hidden_act" or key in values:
            found = values.get(key)
            if found not in known:
                expected = " or ".join(map(repr, known))
                raise CheckpointError(f"{key} in {source}", found, expected)
    if values.get("tie_word_embeddings") and OURS not in values:
        reason = "how other programs scale tied embeddings is not known"
        raise CheckpointError(f"tie_word_embeddings in {source}", True, "False", reason)


def _with_ours(
    values: dict[str, Any], model: ModelConfig, moe: MoEConfig, source: str
) -> tuple[ModelConfig, MoEConfig]:
    """The settings under `OURS`, after checking that they agree with the other fields.

    Another program may have edited the file without knowing `OURS`; settings that contradict the
    fields it edited would silently undo the edit.
    """
    ours = values[OURS]
    if not isinstance(ours, dict):
        raise CheckpointError(f"{OURS} in {source}", type(ours).__name__, "an object")
    run = RunConfig.from_dict(ours, source)
    pairs = [(run.model, model, _MODEL_FIELDS), (run.moe, moe, _MOE_FIELDS)]
    for mine, theirs, names in pairs:
        for name in names:
            if getattr(mine, name) != getattr(theirs, name):
                what = f"{name} under {OURS} in {source}"
                expected = f"{getattr(theirs, name)!r} as in the rest of the file"
                raise CheckpointError(what, getattr(mine, name), expected)
    pattern = moe_layer_pattern(run.moe.moe_layer_freq, run.model.num_layers)
    if pattern != moe_layer_pattern(moe.moe_layer_freq, model.num_layers):
        what = f"moe_layer_freq under {OURS} in {source}"
        raise CheckpointError(what, run.moe.moe_layer_freq, moe.moe_layer_freq)
    written = {**_expert_fields(run), **_dropouts(run.model)}
    for name in _PUBLISHED:
        if values.get(name, written[name]) != written[name]:
            what = f"{name} in {source}"
            expected = f"{written[name]!r} as under {OURS}"
            raise CheckpointError(what, values[name], expected, "change both")
    return run.model, run.moe


_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "key_value_heads",
    "rotary_base",
    "norm_epsilon",
    "ffn_variant",
    "softmax_scale",
    "qk_layernorm",
    "qk_layernorm_scope",
    "untie_embeddings_and_output_weights",
    "scale_tied_logits",
)
_MOE_FIELDS = ("num_experts", "moe_router_topk", "moe_shared_expert_placement")
_PUBLISHED = (
    "router_capacity_factor_train",
    "router_capacity_factor_eval",
    "router_min_capacity",
    "router_drop_tks",
    "router_aux_loss_factor",
    "router_z_loss_factor",
    "z_loss_factor",
    "attention_dropout",
    "dropout_rate",
)
"""Fields compared as they are written, since several settings can give one value."""
