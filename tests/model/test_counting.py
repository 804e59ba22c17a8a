"""Counts against the published table, closed forms, the modules' own, and PyTorch's."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import OPENMOE_VOCAB, PRESETS
from megatron_moe.errors import UsageError
from megatron_moe.model.counting import (
    count_parameters,
    fewest_ranks,
    flops_per_token,
    parameters_per_rank,
)
from megatron_moe.model.reference import ReferenceOpenMoE

SMALL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_channels=16
)
SMALL_MOE = MoEConfig(
    num_experts=4,
    moe_layer_freq="[0,1]*2",
    moe_ffn_hidden_size=40,
    moe_shared_expert_intermediate_size=24,
)


def _published(name: str) -> tuple[ModelConfig, MoEConfig]:
    run = PRESETS[name]
    return run.model, run.moe


@pytest.mark.parametrize(
    ("preset", "billions", "tolerance", "with_embeddings"),
    [
        ("openmoe-base-16e", 0.6498, 0.0003, True),
        ("openmoe-8b-32e", 8.78, 0.005, True),
        ("openmoe-34b-32e", 33.8, 0.05, False),
        ("openmoe-base-16e-released", 0.800, 0.0005, True),
        ("openmoe-8b-32e-released", 11.86, 0.005, True),
        ("openmoe-34b-32e-released", 46.27, 0.005, True),
    ],
)
def test_totals_are_the_published_ones(
    preset: str, billions: float, tolerance: float, with_embeddings: bool
) -> None:
    counts = count_parameters(*_published(preset), OPENMOE_VOCAB)
    total = counts.total if with_embeddings else counts.total_without_embeddings
    assert total / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize("preset", [name for name in PRESETS if "tiny" not in name])
def test_counts_are_the_modules_own_on_the_meta_device(preset: str) -> None:
    model, moe = _published(preset)
    built = ReferenceOpenMoE(model, moe, OPENMOE_VOCAB, device="meta")
    assert all(parameter.is_meta for parameter in built.parameters())
    total = sum(parameter.numel() for parameter in built.parameters())
    assert count_parameters(model, moe, OPENMOE_VOCAB).total == total


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        # layers, MoE layers, H, n d, F, E, matrices of an FFN, embedding matrices
        ("openmoe-base-16e", (12, 3, 768, 768, 3072, 16, 3, 1)),
        ("openmoe-base-16e-released", (12, 3, 768, 768, 2048, 16, 4, 2)),
        ("openmoe-8b-32e", (24, 4, 2048, 3072, 8192, 32, 3, 1)),
        ("openmoe-8b-32e-released", (24, 4, 2048, 3072, 8192, 32, 4, 2)),
        ("openmoe-34b-32e", (32, 8, 3072, 3072, 12288, 32, 3, 1)),
        ("openmoe-34b-32e-released", (32, 8, 3072, 3072, 12288, 32, 4, 2)),
    ],
)
def test_total_and_activated_follow_the_closed_form(preset: str, size: tuple[int, ...]) -> None:
    layers, moe_layers, hidden, inner, ffn, experts, matrices, embeddings = size
    a, f = 4 * hidden * inner, matrices * hidden * ffn
    third_norms = moe_layers if matrices == 4 else 0
    small = moe_layers * hidden * experts + (2 * layers + third_norms + 1) * hidden
    embedding = embeddings * OPENMOE_VOCAB * hidden
    counts = count_parameters(*_published(preset), OPENMOE_VOCAB)
    assert counts.total == layers * (a + f) + moe_layers * experts * f + embedding + small
    assert counts.activated == layers * (a + f) + moe_layers * 2 * f + embedding + small
    assert counts.activated - counts.activated_without_embeddings == embedding


def test_the_documented_shapes_of_other_models_have_their_sizes() -> None:
    """TinyLlama 1.1B and OLMoE-1B-7B, from the commands of docs/model.md."""
    page = (Path(__file__).parents[2] / "docs/model.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    counts = []
    for line in block.replace("\\\n", " ").splitlines():
        run = parse_args(shlex.split(line)[2:]).config
        assert run.data.vocab_size is not None
        counts.append(count_parameters(run.model, run.moe, run.data.vocab_size))
    assert [each.total for each in counts] == [1_100_048_384, 6_919_161_856]
    assert round(counts[1].activated / 1e9, 2) == 1.28


def test_activated_of_base_is_the_printed_one_with_the_released_sizes() -> None:
    counts = count_parameters(*_published("openmoe-base-16e-released"), OPENMOE_VOCAB)
    assert counts.activated_without_embeddings / 1e6 == pytest.approx(141.6, abs=0.05)
    a, f = 4 * 768 * 768, 4 * 768 * 2048
    matrices = 12 * a + (12 + 6) * f
    kinds = ("attention", "ffn", "expert", "shared")
    assert sum(counts.activated_by_kind[kind] for kind in kinds) == matrices == 141_557_760


@pytest.mark.parametrize("variant", ["swiglu", "gated-swiglu"])
@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_forward_flops_are_those_that_pytorch_counts(
    variant: str, untied: bool, groups: int
) -> None:
    model = replace(
        SMALL,
        ffn_variant=variant,
        untie_embeddings_and_output_weights=untied,
        group_query_attention=groups < 4,
        num_query_groups=groups,
    )
    moe = replace(SMALL_MOE, moe_eval_capacity_factor=None)
    reference = ReferenceOpenMoE(model, moe, 64)
    batch, length = 2, 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        reference(torch.randint(64, (batch, length)), training_capacity=False)
    ours = flops_per_token(model, moe, 64, length)
    # That attention computes masked scores too: S keys of a query rather than (S + 1) / 2.
    full_scores = 4 * 2 * 2 * 64 * length
    expected = ours.forward - ours.attention_scores + full_scores
    assert counter.get_total_flops() == batch * length * expected
    assert ours.attention_scores / full_scores == pytest.approx((length + 1) / (2 * length))


def test_backward_flops_are_twice_the_forward_ones() -> None:
    moe = replace(SMALL_MOE, moe_expert_capacity_factor=None)
    reference = ReferenceOpenMoE(SMALL, moe, 64)
    tokens = torch.randint(64, (2, 16))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = reference(tokens, tokens, training_capacity=True).loss
        assert loss is not None
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    ours = flops_per_token(SMALL, moe, 64, 16)
    assert ours.training == 3 * ours.forward


def test_dropped_choices_take_expert_flops_away() -> None:
    flops = flops_per_token(SMALL, SMALL_MOE, 64, 16)
    assert flops.training_with_drops(1.0) == flops.training
    # Two MoE layers, two choices, four matrices of 32 x 40, a multiply-add counts two.
    assert flops.experts == 2 * 2 * 2 * 4 * 32 * 40
    assert flops.training - flops.training_with_drops(0.5) == 3 * flops.experts / 2


@pytest.mark.parametrize("untied", [True, False])
def test_per_rank_counts_worked_by_hand(untied: bool) -> None:
    model = replace(SMALL, untie_embeddings_and_output_weights=untied)
    stages = parameters_per_rank(model, SMALL_MOE, 64, tp=2, pp=2, ep=4, etp=2)
    attention = 4 * 32 * 64 // 2
    dense_layer = attention + 2 * 32 + 4 * 32 * 48 // 2
    moe_layer = attention + 3 * 32 + 4 * 32 + 4 * 32 * 24 // 2
    embedding = 64 * 32 // 2
    # One expert a rank, half of it each.
    assert [stage.expert for stage in stages] == [4 * 32 * 40 // 2] * 2
    assert stages[0].dense == dense_layer + moe_layer + embedding
    assert stages[1].dense == dense_layer + moe_layer + embedding + 32
    assert stages[0].total == stages[0].dense + stages[0].expert


def test_chunks_of_an_interleaved_pipeline_go_round_the_stages() -> None:
    moe = replace(SMALL_MOE, moe_layer_freq="[1,0,0,0]")
    blocks = parameters_per_rank(SMALL, moe, 64, pp=2)
    rounds = parameters_per_rank(SMALL, moe, 64, pp=2, chunk_layers=(1, 1, 1, 1))
    assert blocks[0].expert == rounds[0].expert == 4 * 4 * 32 * 40
    moe = replace(SMALL_MOE, moe_layer_freq="[0,0,1,0]")
    assert parameters_per_rank(SMALL, moe, 64, pp=2)[0].expert == 0
    assert (
        parameters_per_rank(SMALL, moe, 64, pp=2, chunk_layers=(1, 1, 1, 1))[0].expert
        == 4 * 4 * 32 * 40
    )


def test_one_rank_holds_everything() -> None:
    (rank,) = parameters_per_rank(SMALL, SMALL_MOE, 64)
    assert rank.total == count_parameters(SMALL, SMALL_MOE, 64).total


@pytest.mark.parametrize(
    ("degrees", "named"),
    [
        ({"tp": 3}, "--num-attention-heads"),
        ({"ep": 3}, "--num-experts"),
        ({"pp": 3}, "--num-layers"),
        ({"etp": 3}, "width of an expert"),
    ],
)
def test_degrees_that_do_not_divide_are_rejected(degrees: dict[str, int], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parameters_per_rank(SMALL, SMALL_MOE, 64, **degrees)


def test_query_groups_that_tensor_parallelism_does_not_divide_are_rejected() -> None:
    grouped = replace(SMALL, group_query_attention=True, num_query_groups=2)
    with pytest.raises(UsageError, match=r"--num-query-groups must be a multiple of .*\(4\)"):
        parameters_per_rank(grouped, SMALL_MOE, 64, tp=4)


def test_grouped_parameters_worked_by_hand() -> None:
    """H = 32, 4 heads and 2 groups of 16; the norm of OLMoE has a scale for each channel."""
    grouped = replace(SMALL, group_query_attention=True, num_query_groups=2, qk_layernorm=True)
    counts = count_parameters(grouped, SMALL_MOE, 64).by_kind
    assert counts["attention"] == 4 * (2 * 32 * 64 + 2 * 32 * 32)
    norms = count_parameters(SMALL, SMALL_MOE, 64).by_kind["norm"]
    assert counts["norm"] - norms == 4 * (16 + 16)
    whole = replace(grouped, qk_layernorm_scope="projection")
    assert count_parameters(whole, SMALL_MOE, 64).by_kind["norm"] - norms == 4 * (64 + 32)
    # Each of two ranks has half of the channels, but all of a scale that heads share.
    (rank,) = parameters_per_rank(grouped, SMALL_MOE, 64, tp=2)
    (other,) = parameters_per_rank(whole, SMALL_MOE, 64, tp=2)
    assert other.dense - rank.dense == 4 * ((64 + 32) // 2 - 2 * 16)


def test_the_fewest_ranks_that_tile_dense_and_expert_groups() -> None:
    assert fewest_ranks(tp=2, pp=3, ep=4, etp=1) == 12
    assert fewest_ranks(tp=4, pp=1, ep=3, etp=2) == 12
