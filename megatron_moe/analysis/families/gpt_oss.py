"""GPT-OSS (OpenAI, arXiv 2508.10925): softmax over the best K logits; experts with biases.

    logits = W x + b,  weights = softmax(best K logits)
    expert(x) = ((up + 1) * g * sigmoid(alpha g)) W_down + b_down
    g = min(W_gate x + b_gate, limit),  up = clip(W_up x + b_up, -limit, limit)

A softmax over the K chosen logits equals a softmax over all, divided by the sum of the K. Gate and
up projections are alternating columns of one matrix.

Shapes: T tokens, F width of an expert, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_moe.analysis.family import Family, every_layer, register
from megatron_moe.analysis.model import ExpertPass
from megatron_moe.analysis.rule import RoutingRule


def clamped_expert(experts: Any, expert: int, x_TH: Tensor) -> ExpertPass:
    """One expert of a module with stacks [E, H, 2F] and [E, F, H], each with a bias."""
    both = x_TH.float() @ experts.gate_up_proj[expert].float()
    both = both + experts.gate_up_proj_bias[expert].float()
    gate = both[:, 0::2].clamp(max=experts.limit)
    up = both[:, 1::2].clamp(min=-experts.limit, max=experts.limit)
    activation = gate * (gate * experts.alpha).sigmoid()
    inner = (up + 1) * activation
    output = inner @ experts.down_proj[expert].float() + experts.down_proj_bias[expert].float()
    return ExpertPass(activation_TF=activation, inner_TF=inner, output_TH=output)


FAMILY = register(
    "gpt_oss",
    Family(
        label="GPT-OSS",
        classes="GptOss",
        experts="num_local_experts",
        width="intermediate_size",
        rule=lambda config: RoutingRule(topk=config.num_experts_per_tok, normalised=True),
        moe_layers=every_layer,
        router="router",
        router_bias=True,
        interleaved=True,
        expert=clamped_expert,
    ),
)
