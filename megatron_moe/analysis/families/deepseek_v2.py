"""DeepSeek-V2 (arXiv 2405.04434): softmax, best K of the best groups; shared experts."""

from __future__ import annotations

from typing import Any

from megatron_moe.analysis.family import Family, after_dense, register
from megatron_moe.analysis.rule import RoutingRule
from megatron_moe.errors import UsageError


def group_limited(config: Any) -> RoutingRule:
    """`norm_topk_prob` has no effect: the class never normalises."""
    rule = {"topk": config.num_experts_per_tok, "scale": float(config.routed_scaling_factor)}
    if config.topk_method == "greedy":
        return RoutingRule(**rule)
    if config.topk_method != "group_limited_greedy":
        expected = "'greedy' or 'group_limited_greedy'"
        raise UsageError("topk_method of DeepSeek-V2", config.topk_method, expected)
    return RoutingRule(**rule, groups=config.n_group, kept_groups=config.topk_group)


def shared_width(config: Any) -> int:
    """Width of the shared experts together."""
    return int(config.moe_intermediate_size * config.n_shared_experts)


FAMILY = register(
    "deepseek_v2",
    Family(
        label="DeepSeek-V2",
        classes="DeepseekV2",
        experts="n_routed_experts",
        rule=group_limited,
        moe_layers=after_dense,
        shared="shared_experts",
        shared_width=shared_width,
    ),
)
