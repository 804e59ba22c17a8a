"""The model of a Megatron-LM checkpoint: its arguments (`args` of `common.pt`) as a `RunConfig`.

An argument with which this project's network would compute something else is an error that names
the flag. Arguments that do not change the network (layouts, fusions, learning rates) are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.convert.hf_files import MANY, SIZE
from megatron_moe.convert.pickled import describe
from megatron_moe.errors import CheckpointError


@dataclass(frozen=True)
class _Only:
    """What an argument must be.

    Args:
        values: allowed values.
        absent: what older releases without the argument mean.
        reason: for the error.
    """

    values: tuple[Any, ...]
    absent: Any
    reason: str


_NOT = "this project has no such model"
_OFF = _Only((False, None), False, _NOT)
_ONLY: dict[str, _Only] = {
    "normalization": _Only(("RMSNorm",), "LayerNorm", "norms here are RMSNorm"),
    "swiglu": _Only((True,), False, "feed-forward layers here are gated by SiLU"),
    "position_embedding_type": _Only(("rope",), "learned_absolute", "positions here are rotary"),
    "add_bias_linear": _Only((False,), True, "layers here have no biases (--disable-bias-linear)"),
    "rotary_percent": _Only((1.0,), 1.0, "all channels are rotated here"),
    "rotary_seq_len_interpolation_factor": _Only((None, 1), None, _NOT),
    "softmax_type": _Only(("vanilla",), "vanilla", _NOT),
    "window_size": _Only((None,), None, "attention here has no window"),
    "mtp_num_layers": _Only((None, 0), None, "there is no multi-token prediction here"),
    "no_rope_freq": _Only((None,), None, _NOT),
    "experimental_attention_variant": _Only((None,), None, _NOT),
    "heterogeneous_layers_config_path": _Only((None,), None, _NOT),
    "activation_func_clamp_value": _Only((None,), None, _NOT),
    "glu_linear_offset": _Only((0, None), 0.0, _NOT),
    "is_hybrid_model": _OFF,
    "add_qkv_bias": _OFF,
    "apply_layernorm_1p": _Only((False,), False, "store scales plus one, and unset it"),
    "multi_latent_attention": _OFF,
    "qk_l2_norm": _OFF,
    "rotary_interleaved": _Only((False,), False, "channel i is paired with i + d/2 here"),
    "use_rope_scaling": _OFF,
    "attention_output_gate": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
}
_EXPERTS: dict[str, _Only] = {
    "moe_router_score_function": _Only(("softmax",), "softmax", "the router here is a softmax"),
    "moe_router_topk_scaling_factor": _Only((None, 1), None, _NOT),
    "moe_router_num_groups": _Only((None, 1), None, "routing here is not limited to groups"),
    "moe_router_topk_limited_devices": _Only((None,), None, _NOT),
    "moe_latent_size": _Only((None,), None, _NOT),
    "moe_router_enable_expert_bias": _OFF,
    "moe_shared_expert_gate": _OFF,
    "moe_apply_probs_on_input": _OFF,
}
_LARGEST = 1e300
"""Upper bound of numbers, which an integer in a pickle may exceed."""
_SAME_MODEL = {
    # Fields of the model, and the arguments that they come from.
    "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "key_value_heads": "num_query_groups",
    "kv_channels": "kv_channels",
    "rotary_base": "rotary_base",
    "norm_epsilon": "norm_epsilon",
    "ffn_variant": "swiglu",
    "qk_layernorm": "qk_layernorm",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "softmax_scale": "softmax_scale",
}
_SAME_EXPERTS = {
    "num_experts": "num_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
}
_BALANCING = ("aux_loss", "seq_aux_loss", "none")


class Arguments:
    """The arguments by name, with errors that name flag and file.

    Args:
        values: attributes of `args`.
        source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def error(self, name: str, expected: str, reason: str = "") -> CheckpointError:
        """The error for the value of an argument."""
        value = self.values.get(name)
        plain = isinstance(value, bool | float | str | None) or (
            type(value) is int and abs(value) < SIZE
        )
        found = value if plain else describe(value)
        what = f"--{name.replace('_', '-')} in {self.source}"
        return CheckpointError(what, found, expected, reason)

    def require(self, only: Mapping[str, _Only]) -> None:
        """Require the values of a table."""
        for name, rule in only.items():
            if self.values.get(name, rule.absent) not in rule.values:
                expected = " or ".join(map(repr, rule.values))
                raise self.error(name, expected, rule.reason)

    def whole(self, name: str, default: int | None = None, most: int = SIZE) -> int:
        """A whole number from 1 to ``most``; ``default`` if it is absent or `None`."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(name, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number >= 0; ``default`` if it is absent or `None`."""
        value = self.values.get(name)
        value = default if value is None else value
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not 0 <= value < math.inf or value > _LARGEST:
            raise self.error(name, "a finite number >= 0")
        return float(value)


def megatron_config(values: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that Megatron-LM's arguments describe.

    Args:
        values: attributes of `args`.
        source: the file, for messages.

    Raises:
        CheckpointError: an argument is missing, or this project has no such model.
    """
    args = Arguments(values, source)
    args.require(_ONLY)
    layers, heads = (args.whole(name, most=MANY) for name in ("num_layers", "num_attention_heads"))
    hidden = args.whole("hidden_size")
    grouped = bool(values.get("group_query_attention"))
    groups = args.whole("num_query_groups", heads) if grouped else heads
    if heads % groups:
        raise args.error("num_query_groups", f"a divisor of --num-attention-heads ({heads})")
    scale = values.get("softmax_scale")
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=args.whole("ffn_hidden_size"),
        num_attention_heads=heads,
        group_query_attention=groups != heads,
        num_query_groups=1 if groups == heads else groups,
        kv_channels=args.whole("kv_channels", max(1, hidden // heads)),
        max_position_embeddings=args.whole("max_position_embeddings", 2048),
        rotary_base=args.number("rotary_base", 1e4),
        norm_epsilon=args.number("norm_epsilon", 1e-5),
        ffn_variant="swiglu",
        qk_layernorm=bool(values.get("qk_layernorm")),
        untie_embeddings_and_output_weights=bool(values.get("untie_embeddings_and_output_weights")),
        scale_tied_logits=False,
        softmax_scale=None if scale is None else args.number("softmax_scale", 1.0),
        attention_dropout=args.number("attention_dropout", 0.0),
        hidden_dropout=args.number("hidden_dropout", 0.0),
        logit_z_loss_coeff=0.0,
    )
    run = RunConfig()
    moe = replace(run.moe, moe_layer_freq=f"[0]*{layers}")
    if values.get("num_experts") is not None:
        moe = _experts(args, model)
    return replace(run, model=model, moe=moe)


def check_same_network(values: Mapping[str, Any], source: str, config: RunConfig) -> None:
    """Require that a given configuration computes what the arguments describe.

    Only training may differ: how the load of experts is balanced, capacities, coefficients. Sizes
    that the shapes of the tensors tell are compared with those.

    Args:
        values: attributes of `args`.
        source: the file, for messages.
        config: the configuration in place of the arguments.

    Raises:
        CheckpointError: an argument has another value, or this project has no such model.
    """
    training = {"moe_router_load_balancing_type": "none", "moe_expert_capacity_factor": None}
    described = megatron_config({**values, **training}, source)
    tables: list[tuple[Any, Any, dict[str, str]]] = [(described.model, config.model, _SAME_MODEL)]
    if described.moe_layers:
        tables.append((described.moe, config.moe, _SAME_EXPERTS))
    for ours, given, table in tables:
        for name, flag in table.items():
            if getattr(ours, name) != getattr(given, name):
                expected = f"that of --config, where {name} is {getattr(given, name)}"
                raise Arguments(values, source).error(flag, expected)


def _experts(args: Arguments, model: ModelConfig) -> MoEConfig:
    args.require(_EXPERTS)
    experts, topk = (
        args.whole(name, default, MANY)
        for name, default in (("num_experts", None), ("moe_router_topk", 2))
    )
    normalised = not args.values.get("moe_router_pre_softmax")
    if normalised and topk == 1:
        reason = "every weight would be 1, whatever the router's logits"
        raise args.error("moe_router_pre_softmax", "True with --moe-router-topk 1", reason)
    shared = args.values.get("moe_shared_expert_intermediate_size")
    balancing = args.values.get("moe_router_load_balancing_type", "aux_loss")
    if balancing not in _BALANCING:
        reason = "--config gives the model as a run's config.json instead"
        expected = f"one of {', '.join(_BALANCING)}"
        raise args.error("moe_router_load_balancing_type", expected, reason)
    factor = args.values.get("moe_expert_capacity_factor")
    # Megatron-Core's configuration takes a negative factor as none.
    dropless = factor is None or (isinstance(factor, int | float) and factor < 0)
    capacity = None if dropless else args.number("moe_expert_capacity_factor", 1.0)
    policy = args.values.get("moe_token_drop_policy", "probs")
    if policy not in ("probs", "position"):
        raise args.error("moe_token_drop_policy", "probs or position")
    return MoEConfig(
        num_experts=experts,
        moe_layer_freq=_frequency(args, model.num_layers),
        moe_router_topk=topk,
        moe_router_pre_softmax=not normalised,
        moe_ffn_hidden_size=args.whole("moe_ffn_hidden_size", model.ffn_hidden_size),
        moe_shared_expert_intermediate_size=(
            None if shared is None else args.whole("moe_shared_expert_intermediate_size")
        ),
        moe_shared_expert_placement="parallel",
        moe_capacity_rule="megatron",
        moe_expert_capacity_factor=capacity,
        moe_eval_capacity_factor=capacity,
        moe_token_drop_policy=policy,
        moe_router_load_balancing_type=balancing,
        moe_loss_convention="megatron",
        moe_aux_loss_coeff=args.number("moe_aux_loss_coeff", 0.0),
        moe_z_loss_coeff=args.number("moe_z_loss_coeff", 0.0),
    )


def _frequency(args: Arguments, layers: int) -> str:
    """`--moe-layer-freq`, which Megatron-LM stores as a number or as a list of 0 and 1."""
    value = args.values.get("moe_layer_freq", 1)
    if isinstance(value, list) and len(value) == layers and all(v in (0, 1) for v in value):
        return "[" + ",".join(str(int(v)) for v in value) + "]"
    if type(value) is int and value >= 1:
        return str(value)
    if isinstance(value, str):
        return value
    raise args.error("moe_layer_freq", f"a number, or a list of {layers} zeros and ones")
