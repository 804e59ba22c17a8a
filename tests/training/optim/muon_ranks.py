"""Functions that run on the ranks of the pool: Muon on made-up gradients, in any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.optimizer_state import leaves, optimizer_shards, parameters
from megatron_moe.model.sharding.parts import load_plan
from tests.checkpoint.layouts import Run, load, save, spoil
from tests.parity.cases import run_config
from tests.training.optim.adafactor_ranks import RATE, Block, build_run, step


def muon_config(
    flags: dict[str, Any], variant: str, bf16: bool, settings: dict[str, Any]
) -> RunConfig:
    run = run_config(variant, flags, bf16=bf16)
    muon = {"lr": RATE, "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 0.0, **settings}
    return replace(run, optimizer=replace(run.optimizer, optimizer="muon", **muon))


def set_rates(run: Run) -> None:
    """As a training step does."""
    for group in run.optimizer.param_groups:
        group["lr"] = RATE
        group["weight_decay"] = 0.1 * group.get("wd_mult", 1.0)


def state_of(run: Run) -> list[Block]:
    """What this rank updates, as blocks of logical tensors, and its state."""
    by_param = {shard.param: shard for shard in run.shards}
    found: list[Block] = []
    for leaf in leaves(run.optimizer):
        for param, main, _, _ in parameters(leaf):
            for piece in by_param[param].pieces:
                values = piece.select(main.detach()).clone()
                place = (piece.view_shape, piece.offsets)
                found.append(("weight", piece.name, piece.logical_shape, *place, values))
    for part in load_plan(run.shards, optimizer_shards(run.optimizer)):
        if part.kind not in ("model", "master"):
            place = (part.block.view, part.block.offsets)
            found.append((part.kind, part.name, part.shape, *place, part.values.clone()))
    return found


def muon_steps(rank: int, world_size: int, *, count: int, **setup: Any) -> list[Block]:
    """So many steps from the initial weights."""
    run = build_run(muon_config(**setup), world_size)
    for number in range(count):
        set_rates(run)
        step(run, number)
    return state_of(run)


def muon_save(
    rank: int, world_size: int, *, directory: Any, **setup: Any
) -> tuple[list[Block], list[Block]]:
    """Two steps, a save, and what a third step gives."""
    run = build_run(muon_config(**setup), world_size)
    set_rates(run)
    step(run, 0)
    step(run, 1)
    before = state_of(run)
    save(run, directory)
    step(run, 2)
    return before, state_of(run)


def muon_load(
    rank: int, world_size: int, *, directory: Any, **setup: Any
) -> tuple[list[Block], list[Block]]:
    """What a load gives, and a third step."""
    run = build_run(muon_config(**setup), world_size)
    set_rates(run)
    spoil(run)
    load(run, directory)
    before = state_of(run)
    step(run, 2)
    return before, state_of(run)
