"""Parameters per rank against what the parallel model really holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_moe.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_moe.model.build import build_model
from megatron_moe.model.counting import parameters_per_rank
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from tests.support.pool import Pool

VOCAB = 64
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_channels=16
    ),
    moe=MoEConfig(
        num_experts=4,
        moe_layer_freq="[0,0,1,1]",
        moe_ffn_hidden_size=40,
        moe_shared_expert_intermediate_size=24,
    ),
    train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    parallel=ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    ),
)
INTERLEAVED = replace(CONFIG.parallel, num_virtual_stages_per_pipeline_rank=2)
UNEVEN = replace(CONFIG.parallel, pipeline_model_parallel_layout="E|t|tt|tL")
SPLIT_EXPERTS = replace(
    CONFIG.parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=2
)


def _held(rank: int, world_size: int, config: RunConfig) -> tuple[int, int]:
    """Pipeline stage of this rank and number of parameters on it."""
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    return ctx.pp_rank, sum(p.numel() for chunk in chunks for p in chunk.parameters())


GROUPED = {"group_query_attention": True, "num_query_groups": 2, "qk_layernorm": True}


@pytest.mark.parametrize("scope", ["head", "projection"])
def test_grouped_heads_and_their_norms_are_counted(pool: Pool, scope: str) -> None:
    model = replace(CONFIG.model, **GROUPED, qk_layernorm_scope=scope)  # type: ignore[arg-type]
    config = replace(CONFIG, model=model)
    counted = parameters_per_rank(model, config.moe, VOCAB, tp=2, pp=2, ep=2)
    for stage, held in pool.run(_held, 4, config=config):
        assert held == counted[stage].total


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize("parallel", [CONFIG.parallel, INTERLEAVED, UNEVEN, SPLIT_EXPERTS])
def test_every_rank_holds_what_is_counted(
    pool: Pool, parallel: ParallelConfig, untied: bool
) -> None:
    model = replace(CONFIG.model, untie_embeddings_and_output_weights=untied)
    config = replace(CONFIG, model=model, parallel=parallel)
    counted = parameters_per_rank(
        config.model,
        config.moe,
        VOCAB,
        tp=2,
        pp=2,
        chunk_layers=resolve_layout(config, 4, VOCAB).chunk_layers,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size or 1,
    )
    for stage, held in pool.run(_held, 4, config=config):
        assert held == counted[stage].total
