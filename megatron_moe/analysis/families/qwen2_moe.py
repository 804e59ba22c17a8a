"""Qwen2-MoE (Yang et al., arXiv 2407.10671): softmax, best K; a shared expert behind a gate."""

from __future__ import annotations

from megatron_moe.analysis.family import Family, plain_softmax, register, sparse_steps

FAMILY = register(
    "qwen2_moe",
    Family(
        label="Qwen2-MoE",
        classes="Qwen2Moe",
        rule=plain_softmax,
        moe_layers=sparse_steps,
        shared="shared_expert",
        shared_width=lambda config: config.shared_expert_intermediate_size,
        shared_gate=True,
    ),
)
