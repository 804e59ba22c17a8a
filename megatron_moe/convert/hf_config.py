"""`config.json` of OpenMoE in the Hugging Face layout, to and from `RunConfig`.

The released files name the architecture `OpenMoeForCausalLM` with `model_type` llama. Settings
without a field there (capacity rule, group size, ...) are stored under `megatron_moe`, which other
readers ignore. A model that other readers would compute differently is an error. Source of the
fields: the released `config.json` files and the PyTorch port that reads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig, moe_layer_pattern
from megatron_moe.convert.hf_files import SIZE, number, query_groups, whole_number
from megatron_moe.errors import CheckpointError

OURS = "megatron_moe"
"""Field with the settings of this project."""
_ARCHITECTURE = "OpenMoeForCausalLM"
_PAD, _EOS = 0, 1
_GATES = {"swiglu": "gated-swiglu", "silu": "swiglu"}
"""`--ffn-variant` by `hidden_act`. `swiglu` there splits the gate in two: four matrices."""


def interval_pattern(layers: int, interval: int) -> str:
    """`--moe-layer-freq` of OpenMoE: layer i, from 0, is MoE if (i + 1) % interval == 0."""
    whole, rest = divmod(layers, interval)
    pattern = f"([0]*{interval - 1}+[1])*{whole}"
    return f"{pattern}+[0]*{rest}" if rest else pattern


def to_hf(config: RunConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
        config: configuration of the run.
        vocab_size: V.
        dtype: dtype of the weights, torch's name.

    Raises:
        CheckpointError: the layout cannot represent this model.
    """
    model, moe = config.model, config.moe
    interval = _interval(config)
    _check_expressible(config)
    balance, z = moe.openmoe_coefficients(
        sum(moe_layer_pattern(moe.moe_layer_freq, model.num_layers))
    )
    acts = {variant: act for act, variant in _GATES.items()}
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": dtype,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.kv_channels,
        "hidden_act": acts[model.ffn_variant],
        "mlp_gated": True,
        "attention_bias": False,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "pad_token_id": _PAD,
        "bos_token_id": _PAD,
        "eos_token_id": _EOS,
        "dropout_rate": model.hidden_dropout,
        "layer_norm_epsilon": model.norm_epsilon,
        "use_cache": True,
        "num_experts": moe.num_experts,
        "moe_layer_interval": interval,
        "router_topk": moe.moe_router_topk,
        "router_capacity_factor_train": moe.moe_expert_capacity_factor or 1.25,
        "router_capacity_factor_eval": moe.moe_eval_capacity_factor or 2.0,
        "router_min_capacity": moe.moe_min_capacity,
        "router_noisy_policy": None,
        "router_drop_tks": moe.moe_eval_capacity_factor is not None,
        "router_aux_loss_factor": balance,
        "router_z_loss_factor": z,
        "z_loss_factor": model.logit_z_loss_coeff,
        "label_smoothing": 0.0,
        "enable_load_balance": False,
        "enable_kernel": False,
        "enable_comm_overlap": False,
        "enable_hierarchical_alltoall": False,
        OURS: {section: config.to_dict()[section] for section in ("model", "moe")},
    }


def _interval(config: RunConfig) -> int:
    pattern = moe_layer_pattern(config.moe.moe_layer_freq, config.model.num_layers)
    interval = pattern.index(True) + 1 if True in pattern else len(pattern) + 1
    if pattern != tuple((i + 1) % interval == 0 for i in range(len(pattern))):
        expected = "a pattern of MoE layers i with (i + 1) % N == 0 for the Hugging Face layout"
        raise CheckpointError("--moe-layer-freq", config.moe.moe_layer_freq, expected)
    return interval


def _check_expressible(config: RunConfig) -> None:
    """Require those values that readers of the layout assume without a field for them."""
    model, moe = config.model, config.moe
    width = model.ffn_hidden_size
    fixed = {
        "--softmax-scale": (model.softmax_scale, 1.0),
        "--qk-layernorm": (model.qk_layernorm, False),
        "--untie-embeddings-and-output-weights": (model.untie_embeddings_and_output_weights, True),
        "--moe-shared-expert-placement": (moe.moe_shared_expert_placement, "sequential"),
        "--moe-shared-expert-intermediate-size": (moe.moe_shared_expert_intermediate_size, width),
        "--moe-router-type": (moe.moe_router_type, "softmax"),
        "--moe-ffn-hidden-size": (moe.moe_ffn_hidden_size or width, width),
    }
    faults = [
        f"{flag} must be {only!r} for the Hugging Face layout (got {found!r})"
        for flag, (found, only) in fixed.items()
        if found != only
    ]
    if faults:
        expected = "the released one for the Hugging Face layout"
        raise CheckpointError("variant of the model", "another", expected, "", faults)


def from_hf(values: dict[str, Any], source: str) -> tuple[RunConfig, int]:
    """Configuration and vocabulary size from `config.json`.

    Args:
        values: contents of ``source``.
        source: the file, for messages.

    Raises:
        UsageError: a field is missing or has a value that this project does not implement.
    """
    _check_known(values, source)
    run = RunConfig()
    layers = whole_number(values, "num_hidden_layers", source)
    width = whole_number(values, "intermediate_size", source, most=SIZE)
    heads = whole_number(values, "num_attention_heads", source)
    groups = query_groups(values, heads, source)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=whole_number(values, "hidden_size", source, most=SIZE),
        ffn_hidden_size=width,
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=1 if groups == heads else groups,
        kv_channels=whole_number(values, "head_dim", source),
        max_position_embeddings=whole_number(values, "max_position_embeddings", source, most=SIZE),
        rotary_base=number(values, "rope_theta", source, 1e4),
        norm_epsilon=number(values, "rms_norm_eps", source, 1e-6),
        ffn_variant=_GATES[values["hidden_act"]],  # type: ignore[arg-type]
    )
    drops = bool(values.get("router_drop_tks", True))
    moe = MoEConfig(
        num_experts=whole_number(values, "num_experts", source),
        moe_layer_freq=interval_pattern(layers, whole_number(values, "moe_layer_interval", source)),
        moe_router_topk=whole_number(values, "router_topk", source),
        moe_shared_expert_intermediate_size=width,
        moe_expert_capacity_factor=number(values, "router_capacity_factor_train", source, 1.25),
        moe_eval_capacity_factor=(
            number(values, "router_capacity_factor_eval", source, 2.0) if drops else None
        ),
        moe_min_capacity=whole_number(values, "router_min_capacity", source, 4),
        moe_aux_loss_coeff=number(values, "router_aux_loss_factor", source, 0.01),
        moe_z_loss_coeff=number(values, "router_z_loss_factor", source, 1e-4),
    )
    if OURS in values:
        model, moe = _with_ours(values[OURS], model, moe, source)
    return replace(run, model=model, moe=moe), whole_number(values, "vocab_size", source, most=SIZE)


_MEANINGS = {
    "architectures": ([_ARCHITECTURE],),
    "hidden_act": tuple(_GATES),
    "mlp_gated": (True,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
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


def _with_ours(
    ours: Any, model: ModelConfig, moe: MoEConfig, source: str
) -> tuple[ModelConfig, MoEConfig]:
    """The settings under `OURS`, after checking that they agree with the other fields.

    Another program may have edited the file without knowing `OURS`; settings that contradict the
    fields it edited would silently undo the edit.
    """
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
    return run.model, run.moe


_MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "key_value_heads",
    "rotary_base",
    "norm_epsilon",
    "ffn_variant",
    "softmax_scale",
    "untie_embeddings_and_output_weights",
)
_MOE_FIELDS = ("num_experts", "moe_router_topk", "moe_shared_expert_placement")
