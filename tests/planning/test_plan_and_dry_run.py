"""The planner's formulas against a dry run of the same layout: parameters, peak memory, traffic.

The dry run executes the real model, schedule and optimizer on fake tensors, so the layouts are
larger than those of `test_step_memory.py` and `test_traffic.py`, whose ranks really run.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_moe.planning.dry_run import RankReport, dry_run_rank
from megatron_moe.planning.layout_plan import step_transfers
from megatron_moe.planning.memory import stage_parameters
from megatron_moe.planning.step_memory import step_memory
from megatron_moe.training.phases import Phase, resolve_run_schedule
from tests.planning.ranks import PLANNED, SMALLEST, VOCAB, planned_config
from tests.support.pool import Pool

TOLERANCE = 0.05
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SHARDED = "--bf16 --use-distributed-optimizer"
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = [
    (
        64,
        f"{OVERLAPPED} --expert-model-parallel-size 4 --logits-chunk-tokens 100"
        " --global-batch-size 256",
    ),
    (
        32,
        f"{TP} {SHARDED} --pipeline-model-parallel-size 2 --expert-model-parallel-size 4"
        " --expert-tensor-parallel-size 1 --global-batch-size 64",
    ),
    (
        16,
        "--pipeline-model-parallel-size 4 --num-layers 7 --moe-layer-freq 2"
        f" --decoder-last-pipeline-num-layers 1 --expert-model-parallel-size 2 {FULL}"
        " --global-batch-size 32",
    ),
    (
        8,
        f"--tensor-model-parallel-size 4 --sequence-parallel --expert-tensor-parallel-size 2"
        f" --expert-model-parallel-size 2 {FULL}",
    ),
    (
        16,
        f"{SHARDED} --expert-model-parallel-size 8 --num-experts 16 --moe-expert-impl grouped"
        " --moe-expert-capacity-factor None --moe-dropless-buffer-factor 1.5"
        " --global-batch-size 32",
    ),
]
"""Ranks and flags: an overlapped sharded optimizer and chunks of logits; every kind of group;
recomputed stages of unlike size; recomputed ranks that gather each other's rows; a bounded
buffer."""


def _phase(ranks: int, flags: list[str]) -> Phase:
    return resolve_run_schedule(planned_config(flags), ranks, VOCAB).phases[0]


def _dry(rank: int, world_size: int, *, flags: list[str], of: int) -> list[RankReport]:
    """The first rank of the first and of the last stage."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    phase = _phase(of, flags)
    stage = of // phase.layout.pp
    return [dry_run_rank(phase, VOCAB, number) for number in sorted({0, of - stage})]


# Seconds for each rank of a dry run.
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
def test_a_plan_is_what_a_dry_run_does(pool: Pool, ranks: int, flags: str) -> None:
    phase = _phase(ranks, flags.split())
    config, layout = phase.config, phase.layout
    counts = stage_parameters(config, layout, VOCAB)
    stages = step_memory(config, layout, VOCAB, device="cpu", threads=1, overwrites_gradient=True)
    (reports,) = pool.run(_dry, 1, timeout=600.0, flags=flags.split(), of=ranks)
    for report in reports:
        stage = report.coordinates["pp"]
        assert (report.dense_parameters, report.expert_parameters) == (
            counts[stage].dense,
            counts[stage].expert,
        )
        error = stages[stage].peak.total / report.peak.total - 1
        assert abs(error) < TOLERANCE, (stage, stages[stage].moment.name, report.peak_at, error)
        planned, found = Counter[str](), Counter[str]()
        for transfer, count in step_transfers(config, layout, VOCAB, stage):
            planned[transfer.operation] += count * transfer.bytes * (transfer.bytes >= SMALLEST)
        for call in report.collectives:
            if call.operation in PLANNED and call.size >= SMALLEST:
                found[call.operation] += call.size
        assert +planned == found, stage
