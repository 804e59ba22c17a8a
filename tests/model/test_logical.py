"""Logical names, shapes, initial statistics, and that initial values depend on nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import (
    LogicalParameter,
    initial_expert,
    initial_tensor,
    initial_tensors,
    logical_parameters,
)

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=3,
    kv_channels=32,
)
MOE = MoEConfig(num_experts=4, moe_layer_freq="[0,1]", moe_shared_expert_intermediate_size=80)


def test_names_and_shapes_of_the_released_variant_in_order() -> None:
    expected = {
        "embedding.weight": (128, 64),
        "layers.0.attention_norm.weight": (64,),
        "layers.0.attention.query.weight": (96, 64),
        "layers.0.attention.key.weight": (96, 64),
        "layers.0.attention.value.weight": (96, 64),
        "layers.0.attention.output.weight": (64, 96),
        "layers.0.ffn_norm.weight": (64,),
        "layers.0.ffn.gate.weight": (192, 64),
        "layers.0.ffn.up.weight": (96, 64),
        "layers.0.ffn.down.weight": (64, 96),
        "layers.1.attention_norm.weight": (64,),
        "layers.1.attention.query.weight": (96, 64),
        "layers.1.attention.key.weight": (96, 64),
        "layers.1.attention.value.weight": (96, 64),
        "layers.1.attention.output.weight": (64, 96),
        "layers.1.ffn_norm.weight": (64,),
        "layers.1.moe.router.weight": (4, 64),
        "layers.1.moe.experts.gate": (4, 64, 192),
        "layers.1.moe.experts.up": (4, 64, 96),
        "layers.1.moe.experts.down": (4, 96, 64),
        "layers.1.shared_norm.weight": (64,),
        "layers.1.shared.gate.weight": (160, 64),
        "layers.1.shared.up.weight": (80, 64),
        "layers.1.shared.down.weight": (64, 80),
        "final_norm.weight": (64,),
        "output.weight": (128, 64),
    }
    found = {name: p.shape for name, p in logical_parameters(MODEL, MOE, 128).items()}
    assert list(found.items()) == list(expected.items())


def test_the_paper_variant_has_three_matrices_no_third_norm_and_one_embedding() -> None:
    model = replace(MODEL, ffn_variant="swiglu", untie_embeddings_and_output_weights=False)
    moe = replace(MOE, moe_shared_expert_placement="parallel", moe_ffn_hidden_size=48)
    parameters = logical_parameters(model, moe, 128)
    assert parameters["layers.0.ffn.gate.weight"].shape == (96, 64)
    assert parameters["layers.1.moe.experts.gate"].shape == (4, 64, 48)
    assert parameters["layers.1.moe.experts.down"].shape == (4, 48, 64)
    assert "layers.1.shared.up.weight" in parameters
    assert "layers.1.shared_norm.weight" not in parameters
    assert "output.weight" not in parameters


def test_grouped_heads_and_norms_of_queries_and_keys() -> None:
    model = replace(MODEL, num_attention_heads=4, group_query_attention=True, num_query_groups=2)
    normed = replace(model, qk_layernorm=True)
    whole = replace(normed, qk_layernorm_scope="projection")
    shapes = {}
    for name, each in (("plain", model), ("head", normed), ("projection", whole)):
        parameters = logical_parameters(each, MOE, 128)
        prefix = "layers.1.attention."
        found = {n: p.shape for n, p in parameters.items() if n.startswith(prefix)}
        shapes[name] = {n.removeprefix(prefix): shape for n, shape in found.items()}
    assert shapes["plain"] == {
        "query.weight": (128, 64),
        "key.weight": (64, 64),
        "value.weight": (64, 64),
        "output.weight": (64, 128),
    }
    head = {"query_norm.weight": (32,), "key_norm.weight": (32,)}
    assert shapes["head"] == {**shapes["plain"], **head}
    projection = {"query_norm.weight": (128,), "key_norm.weight": (64,)}
    assert shapes["projection"] == {**shapes["plain"], **projection}
    # Without --group-query-attention the number of groups has no effect, as in Megatron-LM.
    unused = replace(MODEL, num_query_groups=7)
    assert logical_parameters(unused, MOE, 128) == logical_parameters(MODEL, MOE, 128)


def test_no_shared_expert_leaves_neither_its_matrices_nor_its_norm() -> None:
    moe = replace(MOE, moe_shared_expert_intermediate_size=None)
    assert not [name for name in logical_parameters(MODEL, moe, 128) if "shared" in name]


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 1.0),
        ("layers.0.attention.query.weight", math.sqrt(0.1 / 64) / math.sqrt(32)),
        ("layers.0.attention.key.weight", math.sqrt(0.1 / 64)),
        ("layers.0.attention.output.weight", math.sqrt(0.1 / 96)),
        ("layers.0.ffn.gate.weight", math.sqrt(0.1 / 64)),
        ("layers.0.ffn.down.weight", math.sqrt(0.1 / 96)),
        ("layers.1.moe.router.weight", 0.02),
        ("layers.1.moe.experts.up", math.sqrt(0.1 / 64)),
        ("layers.1.moe.experts.down", math.sqrt(0.1 / 96)),
        ("layers.1.shared.down.weight", math.sqrt(0.1 / 80)),
        ("output.weight", math.sqrt(0.1 / 64)),
    ],
)
def test_initial_values_have_the_published_spread(name: str, std: float) -> None:
    tensor = initial_tensor(name, logical_parameters(MODEL, MOE, 2048)[name], seed=7)
    # Four standard errors of a sample standard deviation and of a sample mean.
    assert tensor.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * tensor.numel()))
    assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel())


def test_query_weights_carry_the_scale_that_attention_does_not() -> None:
    folded = logical_parameters(MODEL, MOE, 128)["layers.0.attention.query.weight"]
    plain = logical_parameters(replace(MODEL, softmax_scale=None), MOE, 128)
    query, key = (plain[f"layers.0.attention.{part}.weight"] for part in ("query", "key"))
    assert query.std == pytest.approx(key.std)
    assert folded.std == pytest.approx(key.std / math.sqrt(32))


def test_norm_scales_start_at_one() -> None:
    parameters = logical_parameters(MODEL, MOE, 128)
    norms = [name for name in parameters if "norm" in name]
    assert len(norms) == 6
    for name in norms:
        assert torch.equal(initial_tensor(name, parameters[name], 1), torch.ones(64))


def test_values_depend_on_seed_and_name_and_not_on_global_random_state() -> None:
    parameter = LogicalParameter((32, 16), 0.5, "ffn")
    torch.manual_seed(1)
    first = initial_tensor("layers.0.ffn.up.weight", parameter, 5)
    untouched = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), untouched), "it drew from the global generator"
    assert torch.equal(initial_tensor("layers.0.ffn.up.weight", parameter, 5), first)
    other_name = initial_tensor("layers.1.ffn.up.weight", parameter, 5)
    other_seed = initial_tensor("layers.0.ffn.up.weight", parameter, 6)
    for other in (other_name, other_seed):
        correlation = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]
        assert abs(correlation.item()) < 4 / math.sqrt(first.numel())


def test_values_are_the_same_in_another_process() -> None:
    script = (
        "from megatron_moe.model.logical import LogicalParameter, initial_tensor\n"
        "t = initial_tensor('a.b', LogicalParameter((3, 5), 0.5, 'expert'), 11)\n"
        "print([v.hex() for v in t.flatten().tolist()])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    here = initial_tensor("a.b", LogicalParameter((3, 5), 0.5, "expert"), 11)
    assert run.stdout.strip() == str([v.hex() for v in here.flatten().tolist()])


def test_a_rank_can_make_one_expert_alone() -> None:
    name = "layers.1.moe.experts.down"
    parameter = logical_parameters(MODEL, MOE, 128)[name]
    whole = initial_tensor(name, parameter, 3)
    for expert in range(4):
        assert torch.equal(initial_expert(name, parameter, 3, expert), whole[expert])
    assert not torch.equal(whole[0], whole[1])


def test_all_tensors_differ_from_one_another() -> None:
    parameters = logical_parameters(MODEL, MOE, 128)
    first_values = {}
    for name, tensor in initial_tensors(parameters, 3):
        assert tensor.shape == parameters[name].shape
        assert tensor.dtype == torch.float32
        first_values[name] = tensor.flatten()[0].item() / (parameters[name].std or 1.0)
    drawn = [value for name, value in first_values.items() if "norm" not in name]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("model", "moe", "vocab", "flag"),
    [
        (replace(MODEL, kv_channels=33), MOE, 128, "--kv-channels"),
        (replace(MODEL, hidden_size=0), MOE, 128, "--hidden-size"),
        (
            replace(MODEL, group_query_attention=True, num_query_groups=2),
            MOE,
            128,
            r"--num-query-groups must be a divisor of --num-attention-heads \(3\) \(got 2\)",
        ),
        (replace(MODEL, softmax_scale=0.0), MOE, 128, "--softmax-scale"),
        (MODEL, replace(MOE, moe_router_topk=5), 128, "--moe-router-topk"),
        (MODEL, replace(MOE, moe_router_topk=0), 128, "--moe-router-topk"),
        (MODEL, replace(MOE, moe_ffn_hidden_size=0), 128, "--moe-ffn-hidden-size"),
        (MODEL, MOE, 0, "--vocab-size"),
    ],
)
def test_impossible_sizes_are_rejected_by_flag(
    model: ModelConfig, moe: MoEConfig, vocab: int, flag: str
) -> None:
    with pytest.raises(UsageError, match=flag):
        logical_parameters(model, moe, vocab)


def test_names_and_shapes_need_no_torch() -> None:
    script = (
        "import sys\n"
        "from megatron_moe.config import ModelConfig, MoEConfig\n"
        "from megatron_moe.model.logical import logical_parameters\n"
        "logical_parameters(ModelConfig(), MoEConfig(), 128)\n"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert run.returncode == 0
