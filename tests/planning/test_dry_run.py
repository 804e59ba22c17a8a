"""The dry run of a rank against the same rank of a real run over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.planning.collective_log import mismatches
from megatron_moe.planning.dry_run import RankReport, dry_run_rank, measure_rank
from megatron_moe.platform import activate
from megatron_moe.training.phases import Phase, resolve_run_schedule
from tests.training.ranks import PADDED_VOCAB, tiny_config

BF16 = ["--bf16"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
ETP1 = ["--expert-tensor-parallel-size", "1"]
SHARDED = ["--use-distributed-optimizer"]
RECOMPUTE = "--recompute-granularity"
ADAM = ["--optimizer", "adam"]
SCALARS = 64
"""Bytes."""
PATIENCE = 600.0
"""Seconds for all ranks of a layout, one after the other in one process."""
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "bf16": (1, BF16),
    "adam": (1, [*BF16, *ADAM]),
    "dp2": (2, [*BF16, *ADAM]),
    "dp2 sharded": (2, [*BF16, *ADAM, *SHARDED]),
    "tp2": (2, [*BF16, *TP2]),
    "tp2 sharded": (2, [*BF16, *TP2, *ADAM, *SHARDED]),
    "ep2": (2, [*BF16, *EP2]),
    "pp2": (2, [*BF16, *PP2]),
    "pp2 interleaved": (2, [*BF16, *PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "full recomputation": (
        1,
        f"--bf16 {RECOMPUTE} full --recompute-method uniform --recompute-num-layers 1".split(),
    ),
    "ul2": (2, [*BF16, *EP2, "--objective", "ul2"]),
    "tp2 ep2 pp2": (4, [*BF16, *TP2, *PP2, *EP2, *ETP1, *SHARDED, *ADAM]),
}


def phase_of(world_size: int, flags: list[str]) -> Phase:
    return resolve_run_schedule(tiny_config(flags), world_size, PADDED_VOCAB).phases[0]


def real(rank: int, world_size: int, *, flags: list[str]) -> RankReport:
    """This rank, measured while it really runs."""
    phase = phase_of(world_size, flags)
    config = phase.config
    ctx = initialize_parallel(phase.layout, config.parallel, activate(), config.train.seed)
    return measure_rank(phase, PADDED_VOCAB, ctx, [])


def faked(rank: int, world_size: int, *, flags: list[str], of: int) -> list[RankReport]:
    """Every rank of ``of``, by this process, whose own group is of one rank."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return [dry_run_rank(phase_of(of, flags), PADDED_VOCAB, r) for r in range(of)]


def compared(report: RankReport) -> dict[str, Any]:
    """What must be equal."""
    return {
        "coordinates": report.coordinates,
        "parameters": (report.dense_parameters, report.expert_parameters),
        "at rest": report.at_rest,
        "at the peak": report.peak_at,
        "collectives": report.collectives,
    }


QUICK = ("bf16", "tp2 sharded")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_a_dry_run_is_the_real_run(pool, name):
    """Parameters, live bytes by category at rest and at the peak, and every collective."""
    world_size, flags = LAYOUTS[name]
    real_ones = pool.run(real, world_size, flags=flags)
    (dry_ones,) = pool.run(faked, 1, timeout=PATIENCE, flags=flags, of=world_size)
    for one, other in zip(real_ones, dry_ones, strict=True):
        assert compared(one) == compared(other)
        # A few scalars of PyTorch's own live a little longer on one side.
        assert other.peak.to_dict() == pytest.approx(one.peak.to_dict(), abs=SCALARS)
    assert mismatches({rank.rank: rank.collectives for rank in dry_ones}) == []
