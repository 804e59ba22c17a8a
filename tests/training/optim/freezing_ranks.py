"""Functions that run on the ranks of the pool: steps with frozen parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_moe.model.sharding.optimizer_state import optimizer_shards
from megatron_moe.model.sharding.parts import load_plan
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.step import train_step
from tests.training.ranks import rank_batches, tiny_run

RATE = 1e-2
Snapshot = dict[tuple[str, str, Any, Any], Tensor]
"""(Kind, name, offsets, sizes) of each block on a rank, with its values."""


def snapshot(run: TrainingRun, *, with_state: bool) -> Snapshot:
    """Copies of this rank's weights, and of its optimizer's state."""
    states = optimizer_shards(run.optimizer) if with_state else None
    return {
        (part.kind, part.name, part.block.offsets, part.block.sizes): part.values.detach().clone()
        for part in load_plan(model_shards(run.chunks, run.config.model, run.config.moe), states)
    }


def frozen_steps(
    rank: int, world_size: int, *, flags: list[str], count: int
) -> tuple[list[Snapshot], list[float]]:
    """Everything after 0, 1, ... ``count`` steps (state from the first one on), and norms."""
    run = tiny_run(world_size, flags)
    found, norms = [snapshot(run, with_state=False)], []
    for number in range(count):
        result = train_step(run, rank_batches(run), RATE, number + 1)
        if run.config.parallel.overlap_param_gather:
            for chunk in run.wrapped:
                chunk.start_param_sync(force_sync=True)
        found.append(snapshot(run, with_state=True))
        norms.append(result.grad_norm)
    return found, norms
