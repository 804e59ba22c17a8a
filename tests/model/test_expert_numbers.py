"""Counts and arithmetic of models whose experts are split, or of different number by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.config.shorthand import split_experts
from megatron_moe.convert.hf_config import to_hf
from megatron_moe.convert.llama import to_architecture
from megatron_moe.convert.t5x import check_expressible
from megatron_moe.errors import CheckpointError, UsageError
from megatron_moe.model.counting import (
    count_parameters,
    flops_per_stage,
    flops_per_token,
    parameters_per_rank,
)
from megatron_moe.model.logical import logical_parameters
from megatron_moe.moe.plan import capacity_of

MODEL = ModelConfig(num_layers=4, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2)
MOE = MoEConfig(num_experts=4, moe_layer_freq="[0,1,1,1]", moe_shared_expert_intermediate_size=24)
VOCAB, SEQ = 64, 32
RULES = ("t5x", "port", "megatron")


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_split_experts_have_the_same_parameters_and_arithmetic(factor: int) -> None:
    """All but the router, which has a row for each expert."""
    fine = split_experts(MOE, factor, MODEL.ffn_hidden_size)
    assert (fine.num_experts, fine.moe_router_topk) == (4 * factor, 2 * factor)
    assert fine.moe_ffn_hidden_size == 24 // factor
    whole, parts = (count_parameters(MODEL, moe, VOCAB) for moe in (MOE, fine))
    for kind in whole.by_kind:
        times = factor if kind == "router" else 1
        assert parts.by_kind[kind] == times * whole.by_kind[kind], kind
        assert parts.activated_by_kind[kind] == times * whole.activated_by_kind[kind], kind
    before, after = (flops_per_token(MODEL, moe, VOCAB, SEQ) for moe in (MOE, fine))
    assert after.router == factor * before.router
    assert replace(after, router=before.router) == before
    tensors = logical_parameters(MODEL, fine, VOCAB)
    assert tensors["layers.1.moe.experts.up"].shape == (4 * factor, 16, 24 // factor)


@pytest.mark.parametrize("rule", RULES)
def test_a_split_expert_has_as_many_slots(rule: str) -> None:
    """So that all experts together compute as many elements as before."""
    moe = replace(MOE, moe_capacity_rule=rule)  # type: ignore[arg-type]
    fine = split_experts(moe, 4, 24)
    slots = [
        capacity_of(each, rows=2, row_tokens=256, training=training).slots
        for training in (True, False)
        for each in (moe, fine)
    ]
    assert slots[0] == slots[1]
    assert slots[2] == slots[3]


BY_LAYER = replace(MOE, num_experts=8, moe_layer_num_experts=(4, 8, 2))


def test_layers_have_their_own_experts() -> None:
    tensors = logical_parameters(MODEL, BY_LAYER, VOCAB)
    assert [tensors[f"layers.{i}.moe.router.weight"].shape[0] for i in (1, 2, 3)] == [4, 8, 2]
    assert [tensors[f"layers.{i}.moe.experts.down"].shape[0] for i in (1, 2, 3)] == [4, 8, 2]
    counts, one = (count_parameters(MODEL, moe, VOCAB) for moe in (BY_LAYER, MOE))
    # 14 experts instead of 3 layers of 4; a token still uses two of each layer.
    assert counts.by_kind["expert"] * 12 == one.by_kind["expert"] * 14
    assert counts.activated_by_kind["expert"] == one.activated_by_kind["expert"]
    assert counts.by_kind["router"] == 14 * 16


def test_arithmetic_and_ranks_worked_by_hand() -> None:
    flops = flops_per_token(MODEL, BY_LAYER, VOCAB, SEQ)
    assert flops.router == 2 * 16 * 14
    stages = flops_per_stage(MODEL, BY_LAYER, VOCAB, SEQ, (2, 2), 2)
    assert [stage.router for stage in stages] == [2 * 16 * 4, 2 * 16 * 10]
    expert = 16 * 24 * 4  # a gate of two blocks, up and down
    ranks = parameters_per_rank(MODEL, BY_LAYER, VOCAB, pp=2, ep=2)
    assert [rank.expert for rank in ranks] == [4 * expert // 2, 10 * expert // 2]
    with pytest.raises(UsageError, match="--num-experts must be a multiple"):
        parameters_per_rank(MODEL, BY_LAYER, VOCAB, ep=4)


def test_a_layer_is_configured_once() -> None:
    """Its configuration has its number for good, whichever layer is asked for."""
    moe = replace(BY_LAYER, moe_layer_capacity_factors=(1.0, 2.0, 3.0))
    own = moe.of_layer(2, 4)
    assert (own.num_experts, own.moe_expert_capacity_factor) == (8, 2.0)
    assert own.of_layer(3, 4).num_experts == 8
    assert moe.numbers_of_experts == (2, 4, 8)
    assert own.numbers_of_experts == (8,)


def test_formats_without_experts_by_layer_name_the_flag() -> None:
    config = RunConfig(model=MODEL, moe=BY_LAYER)
    with pytest.raises(UsageError, match="--moe-layer-num-experts must be unset for t5x"):
        check_expressible(config)
    with pytest.raises(CheckpointError, match="--moe-layer-num-experts must be None for the Hugg"):
        to_hf(config, VOCAB, "float32")
    config = replace(config, model=replace(MODEL, kv_channels=8))  # H / heads, as this class has
    with pytest.raises(CheckpointError, match="--moe-layer-num-experts must be None for OlmoeFor"):
        to_architecture("OlmoeForCausalLM", config, VOCAB, "float32")
