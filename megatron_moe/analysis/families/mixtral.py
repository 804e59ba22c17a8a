"""Mixtral (Jiang et al., arXiv 2401.04088): softmax, best K, divided by their sum."""

from __future__ import annotations

from megatron_moe.analysis.family import Family, every_layer, register
from megatron_moe.analysis.rule import RoutingRule

FAMILY = register(
    "mixtral",
    Family(
        label="Mixtral",
        classes="Mixtral",
        experts="num_local_experts",
        width="intermediate_size",
        rule=lambda config: RoutingRule(topk=config.num_experts_per_tok, normalised=True),
        moe_layers=every_layer,
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
    ),
)
