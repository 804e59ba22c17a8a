"""Qwen3-MoE (Yang et al., arXiv 2505.09388): softmax, best K; no shared expert."""

from __future__ import annotations

from megatron_moe.analysis.family import Family, plain_softmax, register, sparse_steps

FAMILY = register(
    "qwen3_moe",
    Family(label="Qwen3-MoE", classes="Qwen3Moe", rule=plain_softmax, moe_layers=sparse_steps),
)
