"""DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, a bias for the selection, groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_moe.analysis.families.deepseek_v2 import FAMILY as DEEPSEEK_V2
from megatron_moe.analysis.family import register
from megatron_moe.analysis.rule import RoutingRule


def biased_sigmoid(config: Any) -> RoutingRule:
    """Sigmoid; groups by their best two."""
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


FAMILY = register(
    "deepseek_v3",
    replace(DEEPSEEK_V2, label="DeepSeek-V3", classes="DeepseekV3", rule=biased_sigmoid),
)
