"""MoE families of other programs: their tensor names, sizes and routing rules.

One entry of `FAMILIES` per family, by the `model_type` of `config.json`. Names are those of the
published files, below `model.layers.i.`; rules are what the classes of `transformers` compute. The
first DeepSeekMoE has no class there and is assembled from two others (`_deepseek_model_class`).
Sources: the classes themselves; Mixtral (arXiv 2401.04088), DeepSeekMoE (2401.06066), DeepSeek-V2
(2405.04434), DeepSeek-V3 (2412.19437), OLMoE (2409.02060), Qwen2 (2407.10671), Qwen3 (2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_moe.convert.hf_files import rotary_base
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a router selects and weights experts.

    Args:
        topk: K.
        score: function from logits to scores; softmax is over all experts.
        normalised: whether the scores of the chosen experts are divided by their sum.
        scale: final factor of the weights.
        groups: number of equal groups of consecutive experts.
        kept_groups: only experts of this many best groups can be chosen.
        group_score: score of a group: that of its best expert, or the sum of its best two.
        biased: a learned bias is added to the scores for the selection, not for the weights.
    """

    topk: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["best", "best two"] = "best"
    biased: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Args:
        label: display name.
        classes: prefix of its class names in `transformers`; empty for DeepSeekMoE, which is
            assembled from other classes.
        experts: config field with the number of experts.
        width: config field with the width of an expert.
        rule: the routing rule of a configuration.
        moe_layers: indices of the MoE layers of a configuration.
        block: module of a layer that contains router and experts.
        matrices: names of the gate, up and down matrices of an expert.
        shared: module of the shared experts, stored as a single wide one; empty for none.
        shared_width: width of the shared expert.
        shared_gate: whether a sigmoid gate weights the output of the shared expert.
    """

    label: str
    classes: str
    experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    rule: Callable[[Any], RoutingRule]
    moe_layers: Callable[[Any], list[int]]
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_width: Callable[[Any], int] = lambda config: 0
    shared_gate: bool = False

    def configuration(
        self, transformers: Any, directory: Path, values: dict[str, Any], source: str
    ) -> Any:
        """The family's configuration object, from the contents of ``source`` in ``directory``."""
        if not self.classes:
            return _deepseek_configuration(transformers, values, source)
        config_class = getattr(transformers, f"{self.classes}Config")
        return config_class.from_pretrained(directory, local_files_only=True)

    def model_class(self, transformers: Any) -> Any:
        """The family's causal language model."""
        if not self.classes:
            return _deepseek_model_class(transformers)
        return getattr(transformers, f"{self.classes}ForCausalLM")


def _every(config: Any) -> list[int]:
    return list(range(config.num_hidden_layers))


def _sparse_steps(config: Any) -> list[int]:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    return [i for i in _every(config) if i not in dense and (i + 1) % step == 0]


def _after_dense(config: Any) -> list[int]:
    return _every(config)[config.first_k_dense_replace :]


def _deepseek_shared(config: Any) -> int:
    return int(config.moe_intermediate_size * config.n_shared_experts)


def _softmax(config: Any) -> RoutingRule:
    return RoutingRule(topk=config.num_experts_per_tok, normalised=bool(config.norm_topk_prob))


def _deepseek_v2(config: Any) -> RoutingRule:
    """`norm_topk_prob` has no effect: the class never normalises."""
    rule = {"topk": config.num_experts_per_tok, "scale": float(config.routed_scaling_factor)}
    if config.topk_method == "greedy":
        return RoutingRule(**rule)
    if config.topk_method != "group_limited_greedy":
        expected = "'greedy' or 'group_limited_greedy'"
        raise UsageError("topk_method of DeepSeek-V2", config.topk_method, expected)
    return RoutingRule(**rule, groups=config.n_group, kept_groups=config.topk_group)


def _deepseek_v3(config: Any) -> RoutingRule:
    return RoutingRule(
        topk=config.num_experts_per_tok,
        score="sigmoid",
        normalised=bool(config.norm_topk_prob),
        scale=float(config.routed_scaling_factor),
        groups=config.n_group,
        kept_groups=config.topk_group,
        group_score="best two",
        biased=True,
    )


_DEEPSEEK_ONLY = {
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
}
"""Required values of these fields of the first DeepSeekMoE, where present."""


def _deepseek_configuration(transformers: Any, values: dict[str, Any], source: str) -> Any:
    """Configuration of the first DeepSeekMoE (Dai et al., arXiv 2401.06066).

    Its published code, which comes with the weights and is never run here, is Llama's block with
    the experts that DeepSeek-V2 kept: softmax, top-k, no groups, shared experts. So this is
    DeepSeek-V2's configuration with Llama's attention heads.

    Args:
        transformers: the package.
        values: contents of ``source``.
        source: the file, for messages.

    Raises:
        UsageError: a field has another value than this model implies.
    """
    for key, only in _DEEPSEEK_ONLY.items():
        if values.get(key, only) != only:
            raise UsageError(f"{key} in {source}", values[key], repr(only))
    rotary_base(values, source)  # raises if there is a scaling, which none of these models has
    # DeepSeek-V2 reads the head width from the size of the rotary part of its heads.
    width = values["hidden_size"] // values["num_attention_heads"]
    changes = {"model_type": "deepseek_v2", "qk_rope_head_dim": width, "topk_method": "greedy"}
    own = {k: v for k, v in values.items() if k not in ("auto_map", "architectures", "head_dim")}
    return transformers.DeepseekV2Config.from_dict({**own, **changes})


def _deepseek_model_class(transformers: Any) -> Any:
    """Class of the first DeepSeekMoE: Llama's, with DeepSeek-V2's MoE in the later layers."""
    import importlib

    modeling = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")

    class DeepseekForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        """Llama with MoE layers after the first dense ones."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers[config.first_k_dense_replace :]:
                layer.mlp = modeling.DeepseekV2Moe(config)
            self.post_init()

    return DeepseekForCausalLM


_DEEPSEEK = Family(
    label="DeepSeekMoE",
    classes="",
    experts="n_routed_experts",
    rule=_deepseek_v2,
    moe_layers=_after_dense,
    shared="shared_experts",
    shared_width=_deepseek_shared,
)

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        label="Mixtral",
        classes="Mixtral",
        experts="num_local_experts",
        width="intermediate_size",
        rule=lambda config: RoutingRule(topk=config.num_experts_per_tok, normalised=True),
        moe_layers=_every,
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
    ),
    "olmoe": Family(
        label="OLMoE",
        classes="Olmoe",
        width="intermediate_size",
        rule=_softmax,
        moe_layers=_every,
    ),
    "qwen2_moe": Family(
        label="Qwen2-MoE",
        classes="Qwen2Moe",
        rule=_softmax,
        moe_layers=_sparse_steps,
        shared="shared_expert",
        shared_width=lambda config: config.shared_expert_intermediate_size,
        shared_gate=True,
    ),
    "qwen3_moe": Family(
        label="Qwen3-MoE", classes="Qwen3Moe", rule=_softmax, moe_layers=_sparse_steps
    ),
    "deepseek": _DEEPSEEK,
    "deepseek_v2": replace(_DEEPSEEK, label="DeepSeek-V2", classes="DeepseekV2"),
    "deepseek_v3": replace(_DEEPSEEK, label="DeepSeek-V3", classes="DeepseekV3", rule=_deepseek_v3),
}
"""By `model_type`."""
