"""The time of schedules whose bubble is known, and properties of the roofline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import load_cluster
from megatron_moe.planning.layout_plan import LayoutPlan, evaluate
from megatron_moe.planning.muon import muon_shares
from megatron_moe.planning.stage_plan import chunk_plans
from megatron_moe.planning.stage_schedule import passes_of, warmup_passes
from megatron_moe.planning.step_time import gemm_seconds, hidden_seconds
from megatron_moe.planning.tensor_sizes import TensorSizes
from megatron_moe.planning.work import Gemm

DENSE = (
    "--num-layers 8 --moe-layer-freq [0]*8 --hidden-size 1024 --ffn-hidden-size 4096 --bf16 "
    "--num-attention-heads 8 --kv-channels 128 --vocab-size 1024 --seq-length 1024 "
    "--micro-batch-size 1 --global-batch-size 32"
)
FREE = {"inter_bandwidth": 1e8, "inter_microseconds": 1e-6, "kernel_microseconds": 1e-6}
"""Links and launches that cost nothing."""


def _plan(flags: str, ranks: int, changes: dict[str, Any] | None = None) -> LayoutPlan:
    config: RunConfig = parse_args([*DENSE.split(), *flags.split()]).config
    layout = resolve_layout(config, ranks, 1024)
    return evaluate(config, layout, 1024, load_cluster("h100", changes or FREE))


def _bubble(plan: LayoutPlan) -> float:
    """Idle time over the busiest stage's work, with its work alone as the ideal."""
    times = zip(plan.time.forward, plan.time.backward, strict=True)
    work = max(sum(p.total for p in (*there, *back)) for there, back in times)
    return plan.time.pipeline / (work * plan.layout.num_microbatches) - 1


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_bubble_is_that_of_the_literature(chunks: int) -> None:
    """(P - 1) / (v M) for equal stages (Narayanan et al., arXiv 2104.04473); ours nearly are."""
    flags = "--pipeline-model-parallel-size 4"
    if chunks > 1:
        flags += f" --num-virtual-stages-per-pipeline-rank {chunks}"
    plan = _plan(flags, 4)
    assert _bubble(plan) == pytest.approx(3 / (chunks * 32), abs=0.02)


def test_order_of_a_stage() -> None:
    """Two stages, two micro-batches: the first stage runs F0 F1 B0 B1, the second F0 B0 F1 B1."""
    first, second = (
        [(p.backward, p.micro_batch) for p in passes_of(stage, 2, 1, 2)] for stage in (0, 1)
    )
    assert first == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert second == [(False, 0), (True, 0), (False, 1), (True, 1)]
    assert warmup_passes(0, 4, 2, 8) == 2 * 3 + 4


def test_simulating_part_of_a_long_step_is_exact() -> None:
    """Rounds beyond the fourth repeat: 64 micro-batches take 32 times the busiest stage longer."""
    flags = "--pipeline-model-parallel-size 4"
    short, long = (_plan(f"{flags} --global-batch-size {size}", 4) for size in (32, 64))
    times = zip(short.time.forward, short.time.backward, strict=True)
    work = max(sum(p.total for p in (*there, *back)) for there, back in times)
    assert long.time.pipeline - short.time.pipeline == pytest.approx(32 * work, rel=1e-9)


def test_a_micro_batch_waits_for_each_transfer_between_stages() -> None:
    """One micro-batch through four stages on four nodes: three transfers there, three back."""
    slow = {**FREE, "gpus_per_node": 1, "inter_microseconds": 1000.0}
    plan = _plan("--pipeline-model-parallel-size 4 --global-batch-size 1", 4, slow)
    assert plan.time.pipeline == pytest.approx(4 * plan.time.busy + 6e-3, rel=1e-6)


def test_imbalance_is_the_busiest_stage_over_the_mean() -> None:
    """Six and two of eight layers, whose logits are few: 6 / 4."""
    flags = "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 2"
    assert _plan(flags, 2).time.imbalance == pytest.approx(1.5, rel=0.02)


def test_a_sharded_optimizer_steps_its_share() -> None:
    """30 bytes for each parameter of the share, 12 for each of the rank, at 85% of 3350 GB/s."""
    plan = _plan("--use-distributed-optimizer", 4)
    numel = plan.stages[0].state.gradients / 4
    seconds = (30 * numel / 4 + 12 * numel) / (0.85 * 3350e9)
    assert plan.time.optimizer == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("flags", "update"),
    [
        ("--optimizer adam", 30),
        ("--optimizer sgd --sgd-momentum 0", 14),
        ("--optimizer sgd --sgd-momentum 0.9", 22),
        ("--optimizer adafactor", 50),
    ],
)
def test_each_optimizer_moves_its_bytes(flags: str, update: int) -> None:
    plan = _plan(flags, 1)
    seconds = (update + 12) * plan.stages[0].state.gradients / 4 / (0.85 * 3350e9)
    assert plan.time.optimizer == pytest.approx(seconds)


def test_muon_adds_its_products() -> None:
    """Five steps of X X^T, its square and that times X, for whole matrices on every rank."""
    plan = _plan("--optimizer muon --bf16", 1)
    config, layout = plan.config, plan.layout
    (share,) = muon_shares(config, layout, 1024)
    hidden, width = config.model.hidden_size, config.model.ffn_hidden_size
    found = {(m, n, k): count for m, n, k, count in share.products}
    assert hidden < width
    blocks = 5 * 8 * (config.model.input_blocks + 1)  # of the feed-forward layers
    for shape in ((hidden, hidden, width), (hidden, width, hidden)):
        assert found[shape] == blocks
    attention = 5 * 8 * 4
    assert found[hidden, hidden, hidden] == blocks + 3 * attention
    slower = _plan("--optimizer adam --bf16", 1)
    assert plan.time.optimizer > slower.time.optimizer


def test_chunks_hide_exchanges_behind_products() -> None:
    """Of four chunks three quarters can overlap: of the exchanges, or of the products if these are
    shorter. The first to arrive and the last to return wait, so nothing is hidden of one chunk.
    """
    flags = "--moe-layer-freq [0,1]*4 --num-experts 8 --expert-model-parallel-size 8"
    whole, parts = (_plan(f"{flags} --moe-a2a-overlap-chunks {n}", 8) for n in (1, 4))
    config, layout = parts.config, parts.layout
    (plan,) = chunk_plans(config, layout, TensorSizes.of(config, layout, 1024), 0)
    (experts,) = [part for part in plan if part.name == "experts"]
    gemms = experts.work.forward.gemms
    products = 4 * sum(gemm_seconds(gemm, parts.cluster, 2) for gemm in gemms)
    ((before,),), ((after,),) = whole.time.forward, parts.time.forward
    assert before.compute == after.compute
    exchanges = before.transfers  # Nothing else is communicated in a forward pass.
    assert 0 < exchanges < products
    assert after.transfers == pytest.approx(0.25 * exchanges)
    work, sizes = experts.work.forward, TensorSizes.of(config, layout, 1024)
    hidden = hidden_seconds(1.0, work, parts.cluster, sizes)
    assert hidden == pytest.approx(0.75 * products / 4), "of one layer, the shorter"


def test_a_contextual_router_has_a_second_product() -> None:
    flags = "--moe-layer-freq [0,1]*4 --num-experts 8"
    linear, contextual = (
        _plan(f"{flags} --moe-router-type {r}", 1) for r in ("linear", "contextual")
    )
    one_pass = 32 * 4 * 2 * 1024 * 8 * 1024  # micro-batches, layers, 2 S E H
    assert contextual.time.flops[0] - linear.time.flops[0] == 3 * one_pass


def test_roofline() -> None:
    cluster = load_cluster("h100")
    large = Gemm(8448, 8192, 8192)
    peak = cluster.peak_flops("bf16") * cluster.gemm_efficiency
    # 66 x 32 tiles are 16 whole waves of 132.
    assert gemm_seconds(large, cluster, 2) == pytest.approx(large.flops / peak)
    # One tile more is a wave more.
    assert gemm_seconds(Gemm(8449, 8192, 8192), cluster, 2) > 1.05 * large.flops / peak
    thin = Gemm(8192, 16, 8192)
    moved = 2 * (8192 * 8192 + 16 * 8192 + 8192 * 16)
    bandwidth = cluster.memory_bandwidth * 1e9 * cluster.memory_efficiency
    assert gemm_seconds(thin, cluster, 2) == pytest.approx(moved / bandwidth)
    # In fp32 the same product takes as much longer as the peak is lower.
    ratio = gemm_seconds(replace(large, precision="fp32"), cluster, 4) / (large.flops / peak)
    assert ratio == pytest.approx(989.4 / 66.9)


def test_mfu_counts_what_is_asked_and_what_is_done() -> None:
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    plain, full = _plan("", 1), _plan(again, 1)
    assert plain.hfu == pytest.approx(plain.mfu, rel=0.02)
    stages = _plan("--pipeline-model-parallel-size 4", 8)
    assert stages.hfu == pytest.approx(stages.mfu, rel=0.02)
    assert full.hfu / full.mfu == pytest.approx(4 / 3, rel=0.03)
    assert full.time.total > plain.time.total
    assert full.peak_bytes < plain.peak_bytes
