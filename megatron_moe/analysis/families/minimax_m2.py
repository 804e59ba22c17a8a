"""MiniMax-M2: sigmoid scores, a bias for the selection, divided by their sum; no shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_moe.analysis.families.mixtral import FAMILY as MIXTRAL
from megatron_moe.analysis.family import register
from megatron_moe.analysis.rule import RoutingRule


def _rule(config: Any) -> RoutingRule:
    topk = config.num_experts_per_tok
    return RoutingRule(topk=topk, score="sigmoid", normalised=True, biased=True)


FAMILY = register(
    "minimax_m2",
    replace(
        MIXTRAL,
        label="MiniMax-M2",
        classes="MiniMaxM2",
        rule=_rule,
        selection_bias="e_score_correction_bias",
    ),
)
