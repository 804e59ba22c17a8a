"""Mixtures of experts that `transformers` has classes for: their names, sizes and routing rules.

One entry of `FAMILIES` each, by the `model_type` of `config.json`. Names are those of the published
files, below `model.layers.i.`; rules are what the classes compute.
Sources: the classes themselves; Mixtral (arXiv 2401.04088), DeepSeekMoE (2401.06066), DeepSeek-V2
(2405.04434), DeepSeek-V3 (2412.19437), OLMoE (2409.02060), Qwen2 (2407.10671), Qwen3 (2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_moe.analysis import deepseek_moe
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a router chooses and weighs experts.

    Args:
        topk: K.
        score: of an expert, from its logit; softmax is over all experts.
        normalised: the chosen experts' scores are divided by their sum.
        scale: what the weights are multiplied with at the end.
        groups: neighbouring experts form groups of equal size, and ...
        kept_groups: ... only the best groups' experts can be chosen, ...
        group_score: ... by their best expert's score or the sum of their best two.
        biased: a learned bias is added to the scores for the choice, not for the weights.
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
        label: for people.
        classes: what the names of its classes in `transformers` begin with; empty for DeepSeekMoE,
            which is put together (`megatron_moe.analysis.deepseek_moe`).
        experts: the setting that counts experts.
        width: the setting that is the width of an expert.
        rule: from a configuration.
        moe_layers: indices, from a configuration.
        block: the layer's module that holds router and experts.
        matrices: gate, up and down of an expert.
        shared: module of the shared experts, which are kept as one wide one; empty: none.
        shared_width: its width.
        shared_gate: whether the shared expert's output is weighed by a sigmoid gate of its own.
    """

    label: str
    classes: str
    experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    rule: Callable[[Any], Rule]
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
            return deepseek_moe.configuration(transformers, values, source)
        chosen = getattr(transformers, f"{self.classes}Config")
        return chosen.from_pretrained(directory, local_files_only=True)

    def model_class(self, transformers: Any) -> Any:
        """The family's causal language model."""
        if not self.classes:
            return deepseek_moe.model_class(transformers)
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


def _softmax(config: Any) -> Rule:
    return Rule(topk=config.num_experts_per_tok, normalised=bool(config.norm_topk_prob))


def _deepseek_v2(config: Any) -> Rule:
    """The class never normalises, whatever `norm_topk_prob` says."""
    rule = {"topk": config.num_experts_per_tok, "scale": float(config.routed_scaling_factor)}
    if config.topk_method == "greedy":
        return Rule(**rule)
    if config.topk_method != "group_limited_greedy":
        expected = "'greedy' or 'group_limited_greedy'"
        raise UsageError("topk_method of a DeepSeek-V2", config.topk_method, expected)
    return Rule(**rule, groups=config.n_group, kept_groups=config.topk_group)


def _deepseek_v3(config: Any) -> Rule:
    return Rule(
        topk=config.num_experts_per_tok,
        score="sigmoid",
        normalised=bool(config.norm_topk_prob),
        scale=float(config.routed_scaling_factor),
        groups=config.n_group,
        kept_groups=config.topk_group,
        group_score="best two",
        biased=True,
    )


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
        rule=lambda config: Rule(topk=config.num_experts_per_tok, normalised=True),
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
