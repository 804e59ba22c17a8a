"""Functions that run on the ranks of the pool: Adafactor on made-up gradients, in any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.optimizer_state import leaves, optimizer_shards, parameters
from tests.checkpoint.layouts import Case, Run, build, load, save, spoil
from tests.parity.cases import run_config

MIN_DIM = 21
"""Above the width of an expert (20), below the other sizes: some matrices are factored."""
RATE = 0.05

Block = tuple[str, str, Any, Any, Any, Tensor]
"""Kind, name, shape, view, offsets, values."""


def config_of(flags: dict[str, Any], variant: str, bf16: bool) -> RunConfig:
    run = run_config(variant, flags, bf16=bf16)
    optimizer = replace(
        run.optimizer, optimizer="adafactor", adafactor_min_dim=MIN_DIM, lr=RATE, min_lr=0.0
    )
    return replace(run, optimizer=optimizer)


def logical_gradient(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Gradients of very different sizes from row to row, and larger from step to step."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + number)
    rows = torch.rand(shape[:-1], generator=generator).pow(3).unsqueeze(-1)
    grad = torch.randn(shape, generator=generator) * (rows if len(shape) > 1 else 1.0)
    if name == "embedding.weight":
        grad[5:50] = 0  # tokens that the batch did not have
    if "experts" in name:
        grad[1] = 0  # an expert that no token went to
    return grad * 1e-3 * 5.0**number


def step(run: Run, number: int) -> None:
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    for shard in run.shards:
        for piece in shard.pieces:
            grad = logical_gradient(piece.name, piece.logical_shape, number)
            piece.select(shard.param.main_grad).copy_(piece.block_of(grad))  # type: ignore[attr-defined]
    run.optimizer.step()


def gathered(run: Run) -> list[Block]:
    """What this rank updates, as blocks of logical tensors, and its state."""
    by_param = {shard.param: shard for shard in run.shards}
    states = optimizer_shards(run.optimizer)
    found: list[Block] = []
    for leaf in leaves(run.optimizer):
        for param, main, _, _ in parameters(leaf):
            for piece in by_param[param].pieces:
                values = piece.select(main.detach()).clone()
                place = (piece.view_shape, piece.offsets)
                found.append(("weight", piece.name, piece.logical_shape, *place, values))
            for part in states[param].parts:
                place = (part.block.view, part.block.offsets)
                found.append((part.kind, part.name, part.shape, *place, part.values.clone()))
    return found


def steps(
    rank: int, world_size: int, *, flags: dict[str, Any], variant: str, bf16: bool, count: int
) -> list[Block]:
    """So many steps from the initial weights."""
    config = config_of(flags, variant, bf16)
    run = build_run(config, world_size)
    for number in range(count):
        step(run, number)
    return gathered(run)


def build_run(config: RunConfig, world_size: int) -> Run:
    return build(Case(world_size, {}), config)


def save_after_two(
    rank: int, world_size: int, *, flags: dict[str, Any], bf16: bool, directory: Any
) -> tuple[list[Block], list[Block]]:
    """Two steps, a save, and what a third step gives."""
    run = build_run(config_of(flags, "released", bf16), world_size)
    step(run, 0)
    step(run, 1)
    before = gathered(run)
    save(run, directory)
    step(run, 2)
    return before, gathered(run)


def load_and_step(
    rank: int, world_size: int, *, flags: dict[str, Any], bf16: bool, directory: Any
) -> tuple[list[Block], list[Block]]:
    """What a load gives, and a third step."""
    run = build_run(config_of(flags, "released", bf16), world_size)
    spoil(run)
    load(run, directory)
    before = gathered(run)
    step(run, 2)
    return before, gathered(run)
