"""`--init-method-std`: the initial values of Megatron-Core's own GPT model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.model.logical import initial_tensors, logical_parameters
from megatron_moe.moe import MoELayer
from tests.support.pool import Pool

STD, LAYERS, HIDDEN, FFN, EXPERTS, VOCAB = 0.006, 2, 256, 512, 4, 2048
OURS = {
    "embedding.word_embeddings.weight": ["embedding.weight"],
    "self_attention.linear_qkv.weight": [f"layers.0.attention.{n}.weight" for n in ("query", "key")]
    + ["layers.0.attention.value.weight"],
    "self_attention.linear_proj.weight": ["layers.0.attention.output.weight"],
    "mlp.linear_fc1.weight": ["layers.0.ffn.gate.weight", "layers.0.ffn.up.weight"],
    "mlp.linear_fc2.weight": ["layers.0.ffn.down.weight"],
    "mlp.router.weight": ["layers.1.moe.router.weight"],
    "local_experts.linear_fc1.weight": ["layers.1.moe.experts.gate", "layers.1.moe.experts.up"],
    "local_experts.linear_fc2.weight": ["layers.1.moe.experts.down"],
    "shared_experts.linear_fc1.weight": ["layers.1.shared.gate.weight"],
    "shared_experts.linear_fc2.weight": ["layers.1.shared.down.weight"],
    "output_layer.weight": ["output.weight"],
}
"""Megatron-Core's weights, without their place, and ours."""


def megatron_stds(rank: int, world_size: int) -> dict[str, list[float]]:
    """Standard deviations of Megatron-Core's GPT model of one dense and one MoE layer."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    from tests.moe.ranks import context_of

    ctx = context_of(world_size, 1, 1, 1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        init_method_std=STD,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        num_moe_experts=EXPERTS,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        VOCAB,
        64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=ctx.pgs,
    )
    stds: dict[str, list[float]] = {}
    for name, weight in model.named_parameters():
        short = re.sub(r"local_experts\.\d+", "local_experts", name)
        short = re.sub(r"decoder\.layers\.\d+\.", "", short)
        if weight.dim() > 1:
            stds.setdefault(short, []).append(weight.std().item())
    return stds


def ours(**settings: Any) -> dict[str, float]:
    config = parse_args(["--init-method-std", str(STD)]).config.model
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=4,
        kv_channels=64,
        init_method_std=config.init_method_std,
        embedding_init_method_std=config.embedding_init_method_std,
        router_init_method_std=config.router_init_method_std,
        **settings,
    )
    moe = MoEConfig(
        num_experts=EXPERTS, moe_layer_freq="[0,1]", moe_shared_expert_intermediate_size=FFN
    )
    tensors = initial_tensors(logical_parameters(model, moe, VOCAB), seed=3)
    return {name: tensor.std().item() for name, tensor in tensors}


@pytest.mark.parametrize("variant", ["swiglu", "gated-swiglu"])
def test_every_matrix_starts_with_the_spread_it_has_in_megatron_core(
    pool: Pool, variant: str
) -> None:
    theirs, mine = pool.run(megatron_stds, 1)[0], ours(ffn_variant=variant)
    named = {key: next(k for k in theirs if k.endswith(key)) for key in OURS}
    assert set(named.values()) == set(theirs), "every matrix of Megatron-Core's has one of ours"
    for key, names in OURS.items():
        expected = sum(theirs[named[key]]) / len(theirs[named[key]])
        for name in names:
            # A sample of n values has a relative error of 1/sqrt(2n); the router has 1024.
            assert mine[name] == pytest.approx(expected, rel=0.07), name
    compared = {name for names in OURS.values() for name in names}
    left = {"layers.1.shared.up.weight"}
    rest = {n for n in mine if "norm" not in n and not n.startswith("layers.1.att")}
    assert rest == compared | left


def test_a_layer_outside_of_a_model_starts_the_same() -> None:
    model = ModelConfig(num_layers=8, init_method_std=0.02)
    layer = MoELayer(model, MoEConfig(num_experts=8), layer_number=0, num_moe_layers=1)
    layer.reset_parameters(1)
    assert layer.experts.weight_in.std().item() == pytest.approx(0.02, rel=0.01)
    assert layer.experts.weight_out.std().item() == pytest.approx(0.02 / 4, rel=0.01)  # sqrt(2 * 8)
