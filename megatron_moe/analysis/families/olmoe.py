"""OLMoE (Muennighoff et al., arXiv 2409.02060): softmax, best K."""

from __future__ import annotations

from megatron_moe.analysis.family import Family, every_layer, plain_softmax, register

FAMILY = register(
    "olmoe",
    Family(
        label="OLMoE",
        classes="Olmoe",
        width="intermediate_size",
        rule=plain_softmax,
        moe_layers=every_layer,
    ),
)
