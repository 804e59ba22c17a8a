"""A model of two tensors in three layouts, without Megatron-Core: what unit tests save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.contents import SaveContents
from megatron_moe.checkpoint.metadata import (
    CONFIG,
    STATE,
    RunIdentity,
    TrainState,
    open_checkpoint,
    state_json,
)
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.checkpoint.save import start_save
from megatron_moe.checkpoint.tensor_files import HostMemory
from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.optimizer_state import OptimizerShard
from megatron_moe.model.sharding.parts import Part, Replicas, load_plan, save_plan
from megatron_moe.model.sharding.shards import ParamShard, Piece
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint.gate import hold_writers

WIDTH, HIDDEN = 8, 6


def logical(step: int = 0) -> dict[str, Tensor]:
    """Names and values, different for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "norm.weight": torch.randn(HIDDEN, generator=generator),
        "ffn.weight": torch.randn(WIDTH, HIDDEN, generator=generator),
    }


def shards(tensors: dict[str, Tensor], part: int = 0, parts: int = 1) -> list[ParamShard]:
    """Rank ``part`` of a tensor-parallel group: `ffn.weight` by rows, `norm.weight` replicated."""
    rows = WIDTH // parts
    ffn = Piece(
        name="ffn.weight",
        logical_shape=(WIDTH, HIDDEN),
        view_shape=(WIDTH, HIDDEN),
        offsets=(part * rows, 0),
        sizes=(rows, HIDDEN),
        select=lambda t: t,
    )
    norm = Piece(
        name="norm.weight",
        logical_shape=(HIDDEN,),
        view_shape=(HIDDEN,),
        offsets=(0,),
        sizes=(HIDDEN,),
        select=lambda t: t,
    )
    return [
        ParamShard(
            param=piece.block_of(tensors[piece.name]).clone(),
            local_name=piece.name,
            pieces=(piece,),
            writer=piece is ffn or part == 0,
            expert=False,
        )
        for piece in (norm, ffn)
    ]


def adam_state(local: list[ParamShard], start: int = 0, stop: int | None = None) -> dict[Any, Any]:
    """Moments that are functions of the weights; a range of each parameter, if given."""
    states = {}
    for shard in local:
        flat = shard.param.reshape(-1)[start:stop]
        tensors = {"exp_avg": flat * 2, "exp_avg_sq": flat * flat}
        states[shard.param] = OptimizerShard(tensors, start, sharded=stop is not None)
    return states


def contents(step: int, ranks: RankGroup | None = None) -> SaveContents:
    """What a rank saves of `logical(step)`: a part of the tensors."""
    ranks = ranks or RankGroup()
    local = shards(logical(step), ranks.rank, ranks.size)
    parts: list[Part] = list(save_plan(local, adam_state(local), Replicas()))
    train = TrainState(iteration=step, consumed_train_samples=8 * step)
    state = state_json(train, RunIdentity(padded_vocab_size=128), optimizer={"step": step})
    other_files = {CONFIG: RunConfig().to_dict(), STATE: state}
    return SaveContents(parts=parts, other_files=other_files, header={"format": "pt"})


def save(directory: Path, step: int, ranks: RankGroup | None = None) -> Path:
    """Save `logical(step)` from all ranks."""
    ranks = ranks or RankGroup()
    return start_save(directory, step, contents(step, ranks), ranks).finish()


def save_async(directory: Path, step: int, ranks: RankGroup | None = None) -> Path:
    """`save`, asynchronously, with tensors that change as soon as they may."""
    ranks = ranks or RankGroup()
    what = contents(step, ranks)
    gate = hold_writers(directory)
    pending = start_save(directory, step, what, ranks, memory=HostMemory(pinned=False))
    for part in what.parts:
        part.values.fill_(float("nan"))
    gate.set()
    return pending.finish()


def load(path: Path, part: int = 0, parts: int = 1) -> tuple[list[ParamShard], dict[Any, Any]]:
    """Read one rank's share of a checkpoint into fresh memory."""
    opened = open_checkpoint(path)
    local = shards({name: torch.zeros_like(t) for name, t in logical().items()}, part, parts)
    states = adam_state(local)
    reader = TensorReader(opened.path, opened.tensors)
    for item in load_plan(local, states):
        reader.fill(item.kind, item.name, item.block, item.values)
    return local, states
