"""Every constraint of a layout, by its message; and what valid layouts resolve to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.config import PrecisionConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import Layout, resolve_layout


def config(**changes: Any) -> RunConfig:
    """12 layers, 12 heads, FFN 96, 8 experts, sequence 64, with fields of any section changed."""
    base = RunConfig()
    sections: dict[str, Any] = {
        "model": replace(
            base.model, num_layers=12, num_attention_heads=12, hidden_size=48, ffn_hidden_size=96
        ),
        "moe": replace(
            base.moe,
            num_experts=8,
            moe_layer_freq="([0]*1+[1])*6",
            moe_shared_expert_intermediate_size=96,
        ),
        "parallel": base.parallel,
        "data": replace(base.data, seq_length=64),
        "train": replace(base.train, micro_batch_size=2, global_batch_size=None),
    }
    for name, value in changes.items():
        (section,) = [key for key, part in sections.items() if hasattr(part, name)]
        sections[section] = replace(sections[section], **{name: value})
    return replace(base, **sections)


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
CHUNKS = "moe_a2a_overlap_chunks"
VPP = "num_layers_per_virtual_pipeline_stage"
VPR = "num_virtual_stages_per_pipeline_rank"
SP = "sequence_parallel"


def test_one_rank() -> None:
    assert resolve_layout(config(), 1) == Layout(
        world_size=1,
        tp=1,
        pp=1,
        vp=None,
        ep=1,
        etp=1,
        dp=1,
        edp=1,
        sequence_parallel=False,
        num_microbatches=1,
        micro_batch_size=2,
        global_batch_size=2,
        seq_length=64,
        chunk_layers=(12,),
    )


def test_ranks_are_divided_twice_for_dense_and_expert_layers() -> None:
    changes = {TP: 2, SP: True, PP: 2, EP: 4, ETP: 1, VPP: 2, "global_batch_size": 16}
    layout = resolve_layout(config(**changes), 16)
    assert (layout.tp, layout.pp, layout.dp) == (2, 2, 4)
    assert (layout.etp, layout.ep, layout.edp) == (1, 4, 2)
    assert (layout.vp, layout.chunk_layers, layout.num_chunks) == (3, (2,) * 6, 3)
    assert layout.num_microbatches == 2
    assert layout.sequence_parallel


def test_expert_tensor_size_is_the_tensor_size_unless_given() -> None:
    assert resolve_layout(config(**{TP: 2, SP: True}), 2).etp == 2
    assert resolve_layout(config(**{TP: 2, SP: True, ETP: 1}), 2).etp == 1


def test_both_ways_of_asking_for_chunks_agree() -> None:
    batch = {"global_batch_size": 8}
    by_layers = resolve_layout(config(**{PP: 2, VPP: 3, **batch}), 2)
    assert by_layers == resolve_layout(config(**{PP: 2, VPR: 2, **batch}), 2)
    assert by_layers.vp == 2


def test_one_chunk_per_rank_is_the_plain_schedule() -> None:
    assert resolve_layout(config(**{PP: 2, VPP: 6}), 2).vp is None
    assert resolve_layout(config(**{VPR: 1}), 1).vp is None


def test_sequence_parallelism_over_one_rank_is_none() -> None:
    assert not resolve_layout(config(**{SP: True}), 1).sequence_parallel


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({TP: 0}, 1, "--tensor-model-parallel-size must be >= 1 (got 0)"),
    ({PP: -1}, 1, "--pipeline-model-parallel-size must be >= 1 (got -1)"),
    ({EP: 0}, 1, "--expert-model-parallel-size must be >= 1 (got 0)"),
    ({ETP: 0}, 1, "--expert-tensor-parallel-size must be >= 1 (got 0)"),
    (
        {TP: 2, SP: True, PP: 2},
        6,
        "--tensor-model-parallel-size x --pipeline-model-parallel-size must be a divisor of the 6 "
        "ranks: 1, 2, 3, 6 (got '2 x 2')",
    ),
    (
        {EP: 4},
        6,
        "--expert-tensor-parallel-size x --expert-model-parallel-size x "
        "--pipeline-model-parallel-size must be a divisor of the 6 ranks: 1, 2, 3, 6 (got '1 x 4 x",
    ),
    (
        {TP: 8, SP: True},
        8,
        "--tensor-model-parallel-size must be a divisor of --num-attention-heads (12): "
        "1, 2, 3, 4, 6, 12 (got 8)",
    ),
    (
        {TP: 4, SP: True, "group_query_attention": True, "num_query_groups": 6},
        4,
        "--tensor-model-parallel-size must be a divisor of --num-query-groups (6): 1, 2, 3, 6"
        " (got 4)",
    ),
    (
        {TP: 4, SP: True, "ffn_hidden_size": 98},
        4,
        "--tensor-model-parallel-size must be a divisor of --ffn-hidden-size (98): "
        "1, 2, 7, 14, 49, 98 (got 4)",
    ),
    (
        {TP: 4, SP: True, "moe_shared_expert_intermediate_size": 30},
        4,
        "--tensor-model-parallel-size must be a divisor of --moe-shared-expert-intermediate-size "
        "(30): 1, 2, 3, 5, 6, 10, 15, 30 (got 4)",
    ),
    (
        {TP: 4, SP: True, "seq_length": 30},
        4,
        "--tensor-model-parallel-size must be a divisor of --seq-length (30): 1, 2, 3, 5, 6, 10, "
        "15, 30 (got 4)",
    ),
    (
        {EP: 3},
        3,
        "--expert-model-parallel-size must be a divisor of --num-experts (8): 1, 2, 4, 8 (got 3)",
    ),
    (
        {ETP: 2, "moe_ffn_hidden_size": 33},
        2,
        "--expert-tensor-parallel-size must be a divisor of --moe-ffn-hidden-size (33): 1, 3, 11, "
        "33 (got 2)",
    ),
    (
        {ETP: 5},
        5,
        "--expert-tensor-parallel-size must be a divisor of --ffn-hidden-size (96): 1, 2, 3, 4, 6, "
        "8, 12, 16, 24, 32, 48, 96 (got 5)",
    ),
    (
        {TP: 2},
        2,
        "--sequence-parallel must be set for MoE layers with --tensor-model-parallel-size 2 (got "
        "False)",
    ),
    (
        {CHUNKS: 2},
        2,
        "--moe-a2a-overlap-chunks must be 1 without expert parallelism (got 2); set "
        "--expert-model-parallel-size",
    ),
    (
        {CHUNKS: 2, EP: 2, ETP: 2},
        4,
        "--moe-a2a-overlap-chunks must be 1 with --expert-tensor-parallel-size 2 (got 2); rows of "
        "ranks that share an expert are gathered in one piece",
    ),
    (
        {CHUNKS: 500, EP: 2},
        2,
        "--moe-a2a-overlap-chunks must be <= ",
    ),
    (
        {EP: 2, "moe_layer_freq": "[0]*12"},
        2,
        "--expert-model-parallel-size must be 1 in a model without MoE layers (got 2)",
    ),
    (
        {ETP: 2, "moe_layer_freq": "[0]*12"},
        2,
        "--expert-tensor-parallel-size must be unset in a model without MoE layers (got 2)",
    ),
    (
        {PP: 5},
        5,
        "--pipeline-model-parallel-size must be a divisor of --num-layers (12): "
        "1, 2, 3, 4, 6, 12 (got 5)",
    ),
    (
        {PP: 2, VPP: 2, VPR: 3},
        2,
        "--num-virtual-stages-per-pipeline-rank must be used without "
        "--num-layers-per-virtual-pipeline-stage (got 3); give one of the two",
    ),
    (
        {PP: 2, VPP: 4},
        2,
        "--num-layers-per-virtual-pipeline-stage must be a divisor of the layers of one "
        "pipeline rank (6): 1, 2, 3, 6 (got 4)",
    ),
    (
        {PP: 2, VPR: 4},
        2,
        "--num-virtual-stages-per-pipeline-rank must be a divisor of the layers of one "
        "pipeline rank (6): 1, 2, 3, 6 (got 4)",
    ),
    (
        {VPR: 2},
        1,
        "--num-virtual-stages-per-pipeline-rank must be used with "
        "--pipeline-model-parallel-size >= 2 (got 2); the interleaved schedule needs several "
        "stages",
    ),
    (
        {VPP: 3},
        1,
        "--num-layers-per-virtual-pipeline-stage must be used with "
        "--pipeline-model-parallel-size >= 2 (got 3)",
    ),
    (
        {PP: 2, VPR: 2, "global_batch_size": 6},
        2,
        "--global-batch-size must be a multiple of micro-batch x data-parallel x pipeline size (4) "
        "(got 6)",
    ),
    (
        {"global_batch_size": 6},
        2,
        "--global-batch-size must be a multiple of micro-batch x data-parallel size "
        "(2 x 2 = 4) (got 6)",
    ),
    ({"global_batch_size": 0}, 1, "--global-batch-size must be >= 1 (got 0)"),
    ({"micro_batch_size": 0}, 1, "--micro-batch-size must be >= 1 (got 0)"),
    (
        {"overlap_param_gather": True, "overlap_grad_reduce": True},
        1,
        "--use-distributed-optimizer must be set with --overlap-param-gather (got False)",
    ),
    (
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        1,
        "--overlap-grad-reduce must be set with --overlap-param-gather (got False)",
    ),
    (
        {"recompute_granularity": "full", "recompute_num_layers": 1},
        1,
        "--recompute-method must be uniform or block with --recompute-granularity full (got None)",
    ),
    (
        {"recompute_granularity": "full", "recompute_method": "uniform"},
        1,
        "--recompute-num-layers must be >= 1 and <= 12, the layers of one model chunk (got None)",
    ),
    (
        {
            PP: 2,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 7,
        },
        2,
        "--recompute-num-layers must be >= 1 and <= 6, the layers of one model chunk (got 7)",
    ),
    (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 4,
            PP: 2,
        },
        2,
        "--recompute-num-layers must be a divisor of the layers of every model chunk (6) (got 4)",
    ),
    (
        {"recompute_method": "block"},
        1,
        "--recompute-method must be used with --recompute-granularity full (got 'block')",
    ),
    (
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        1,
        "--recompute-num-layers must be used with --recompute-granularity full (got 1)",
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ()},
        1,
        "--recompute-modules must be one or more of core_attn, mlp, moe, shared_experts, "
        "layernorm, moe_act (got ())",
    ),
    (
        {
            "recompute_granularity": "selective",
            "recompute_modules": ("shared_experts",),
            "moe_shared_expert_intermediate_size": None,
        },
        1,
        "--recompute-modules must be core_attn, layernorm, mlp or moe (got 'shared_experts')",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), BAD)
def test_a_layout_that_does_not_fit_is_rejected_by_name(
    changes: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_layout(config(**changes), world_size)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_layers_in_bf16_are_those_of_one_stage() -> None:
    fp8 = PrecisionConfig(
        fp8_format="e4m3", first_last_layers_bf16=True, num_layers_at_end_in_bf16=3
    )
    layers = replace(config(num_layers=8, moe_layer_freq="2"), precision=fp8)
    assert resolve_layout(layers, 1).pp == 1
    split = replace(layers, parallel=replace(layers.parallel, **{PP: 4}))
    with pytest.raises(UsageError) as caught:
        resolve_layout(split, 4)
    assert str(caught.value) == (
        "--num-layers-at-end-in-bf16 must be <= 2, the layers of one pipeline stage (got 3)"
    )


def test_a_padded_vocabulary_must_divide() -> None:
    assert resolve_layout(config(**{TP: 3, SP: True, "seq_length": 63}), 3, 384).tp == 3
    with pytest.raises(UsageError) as caught:
        resolve_layout(config(**{TP: 3, SP: True, "seq_length": 63}), 3, 256)
    assert str(caught.value).startswith(
        "--tensor-model-parallel-size must be a divisor of the padded vocabulary (256): 1, 2"
    )


def test_a_dense_model_may_split_tensors_without_splitting_the_sequence() -> None:
    layout = resolve_layout(config(**{TP: 2, "moe_layer_freq": "[0]*12"}), 2)
    assert (layout.tp, layout.etp, layout.sequence_parallel) == (2, 2, False)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"num_experts": 0}, "--num-experts"),
        ({"moe_router_topk": 9}, "--moe-router-topk"),
        ({"kv_channels": 7}, "--kv-channels"),
        ({"moe_capacity_group_size": 7}, "--moe-capacity-group-size"),
        (
            {
                "moe_layer_freq": "[0]*12",
                "recompute_granularity": "selective",
                "recompute_modules": ("moe",),
            },
            "--recompute-modules",
        ),
    ],
)
def test_impossible_models_are_rejected(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_layout(config(**changes), 1)
    assert error.value.what == flag
