"""Asynchronous saves of real models: byte for byte those of synchronous ones, in any layout, while
the next steps change weights, moments and masters.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from megatron_moe.checkpoint.contents import collect_contents
from megatron_moe.checkpoint.manager import host_rank_group
from megatron_moe.checkpoint.save import start_save
from megatron_moe.checkpoint.tensor_files import HostMemory
from tests.checkpoint.gate import hold_writers
from tests.checkpoint.layouts import DIST, STATE, Case, build, save, step

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
OVERLAP = {**DIST, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "1": Case(1, {}),
    "1 bf16 distributed": Case(1, DIST, bf16=True),
    "DP2 overlapped": Case(2, OVERLAP),
    "TP2 Adafactor": Case(2, TP2, optimizer="adafactor"),
    "TP2 Muon": Case(2, TP2, optimizer="muon"),
    "PP2 bf16": Case(2, {"pipeline_model_parallel_size": 2}, bf16=True),
    "EP2 distributed": Case(2, {**EP2, **DIST}),
    "EP2 Adafactor bf16": Case(2, EP2, bf16=True, optimizer="adafactor"),
    "TP2xEP2 distributed bf16": Case(4, {**TP2, **EP2, **DIST}, bf16=True),
}


def _save_both(rank: int, world_size: int, *, case: Case, directory: Any) -> int:
    """A synchronous and an asynchronous save after two steps; steps taken during the latter."""
    config = case.config()
    # So that Adafactor does factor, at these sizes.
    config = replace(config, optimizer=replace(config.optimizer, adafactor_min_dim=8))
    run = build(case, config)
    step(run, 1)
    step(run, 2)
    save(run, directory / "now")
    ranks = host_rank_group(run.ctx, timedelta(seconds=60))
    contents = collect_contents(STATE, **run.parts(), with_rng=True, ranks=ranks)
    gate = hold_writers(directory / "async")
    pending = start_save(directory / "async", 2, contents, ranks, memory=HostMemory(pinned=False))
    step(run, 3)
    assert pending.poll() is None
    gate.set()
    steps, path = 1, None
    while path is None:
        step(run, 3 + steps)
        path, steps = pending.poll(), steps + 1
    return steps


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_a_synchronous_save(pool, tmp_path, name):
    case = CASES[name]
    steps = pool.run(_save_both, case.world_size, case=case, directory=tmp_path)
    assert len(set(steps)) == 1 and steps[0] > 2  # while it was held, and for each phase
    now, later = (tmp_path / part / "iter_0000002" for part in ("now", "async"))
    names = sorted(file.name for file in now.iterdir())
    assert len(names) == 4 + case.world_size
    assert sorted(file.name for file in later.iterdir()) == names
    for each in names:
        assert (later / each).read_bytes() == (now / each).read_bytes(), each
