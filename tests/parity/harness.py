"""Building and running one layout, for parity tests; runs on the ranks of the pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.model.build import build_model
from megatron_moe.model.logical import initial_tensor, logical_parameters
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.shards import Piece, model_shards
from megatron_moe.moe.observing import begin_step
from megatron_moe.moe.statistics import collect_statistics
from megatron_moe.parallel.context import ParallelContext, initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform import activate
from megatron_moe.training.plan import resolve_plan
from megatron_moe.training.run import TrainingRun, prepare_run
from megatron_moe.training.step import count_targets, forward_function, total_sums
from tests.parity.cases import ROWS, VOCAB, document_planes, global_batch, run_config
from tests.parity.compare import Block

SEED = 3
"""Of the data, unless another is given."""


def build(
    variant: str, flags: dict[str, Any], world_size: int, **train: Any
) -> tuple[list[OpenMoEModel], ParallelContext, RunConfig]:
    """Groups and model chunks of this rank."""
    config = run_config(variant, flags, **train)
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    return chunks, ctx, config


def block(piece: Piece, local: Tensor) -> Block:
    """A piece of a tensor shaped like the local parameter, as plain data."""
    data = piece.select(local.detach()).clone()
    return Block(piece.name, piece.logical_shape, piece.view_shape, piece.offsets, data)


def weight_blocks(chunks: list[OpenMoEModel], config: RunConfig) -> list[Block]:
    """All weights of this rank."""
    shards = model_shards(chunks, config.model, config.moe)
    return [block(piece, shard.param) for shard in shards for piece in shard.pieces]


def gradient_blocks(chunks: list[OpenMoEModel], config: RunConfig) -> list[Block]:
    """All gradients of this rank, replicas included, after they were reduced."""
    shards = model_shards(chunks, config.model, config.moe)
    found = []
    for shard in shards:
        if not shard.param.requires_grad:  # a bias of experts
            continue
        grad = shard.param.main_grad  # type: ignore[attr-defined]
        assert torch.isfinite(grad).all(), shard.local_name
        found += [block(piece, grad) for piece in shard.pieces]
    return found


def own_batches(
    ctx: ParallelContext, seed: int = SEED, extra: tuple[str, ...] = ()
) -> list[Batch | None]:
    """This rank's micro-batches of the global batch, in the order the data pipeline gives them."""
    count = ctx.layout.num_microbatches
    if not ctx.needs_data and not extra:
        return [None] * count
    return [micro_batch(index * ctx.layout.dp + ctx.dp_rank, seed, extra) for index in range(count)]


def micro_batch(index: int, seed: int = SEED, extra: tuple[str, ...] = ()) -> Batch:
    """Rows [index * ROWS, + ROWS) of the global batch."""
    rows = slice(index * ROWS, (index + 1) * ROWS)
    tokens, labels, mask = global_batch(seed)
    planes = document_planes(tokens[rows], extra)
    return Batch(tokens[rows], labels[rows], mask[rows], **planes)


@dataclass(frozen=True)
class Outcome:
    """What one rank found in one step; plain data."""

    sums: Tensor
    """Cross entropy, squared log Z and targets, summed over the global batch; zeros elsewhere."""
    aux: dict[int, list[float]]
    """Router z-loss and load-balancing losses by MoE layer, means over the global batch."""
    kept: dict[int, list[int]]
    """Choices kept per expert by MoE layer, over the global batch."""
    gradients: list[Block]


def prepare(
    variant: str, flags: dict[str, Any], world_size: int, bf16: bool = False, **optimizer: Any
) -> TrainingRun:
    """The same run as `pretrain_openmoe.py` builds, on this rank."""
    chunks, ctx, config = build(variant, flags, world_size, bf16=bf16)
    config = replace(config, optimizer=replace(config.optimizer, **optimizer))
    plan = resolve_plan(config, ctx.layout.global_batch_size)
    return prepare_run(config, plan, ctx, chunks, VOCAB)


def one_step(
    rank: int,
    world_size: int,
    variant: str,
    flags: dict[str, Any],
    swap: str | None = None,
    bf16: bool = False,
    extra: tuple[str, ...] = (),
) -> Outcome:
    """Forward and backward of one global batch through the production path.

    Args:
        rank: of this process.
        world_size: ranks.
        variant: of the model.
        flags: the layout.
        swap: name of a logical tensor to spoil: its block is given that of another rank.
        bf16: whether weights and activations are bf16.
        extra: what batches hold of documents.
    """
    run = prepare(variant, flags, world_size, bf16=bf16)
    if swap is not None:
        spoil(run, swap)
    batches = own_batches(run.ctx, extra=extra)
    begin_step(run.chunks, run.config.train.seed, SEED + 1)
    targets = count_targets([b for b in batches if b], run) if run.has_loss else None
    reported = forward_backward(
        run.ctx, forward_function(run, targets, len(batches)), batches, run.wrapped
    )
    sums = total_sums(reported, run)
    torch.distributed.all_reduce(sums)
    statistics = collect_statistics(run.chunks, run.ctx.pgs)
    return Outcome(
        sums=sums,
        aux={i: [s.z_loss, s.aux_loss, *s.further_aux_losses] for i, s in statistics.items()},
        kept={i: [int(n) for n in s.kept] for i, s in statistics.items()},
        gradients=gradient_blocks(list(run.chunks), run.config),
    )


def spoil(run: TrainingRun, name: str) -> None:
    """Give this rank's block of a tensor the values that belong to the next block along a split."""
    table = logical_parameters(run.config.model, run.config.moe, VOCAB)
    whole = initial_tensor(name, table[name], run.config.train.seed)
    for shard in model_shards(list(run.chunks), run.config.model, run.config.moe):
        for piece in shard.pieces:
            if piece.name == name:
                dim = next(i for i, size in enumerate(piece.sizes) if size != piece.view_shape[i])
                rolled = whole.reshape(piece.view_shape).roll(-piece.sizes[dim], dim)
                with torch.no_grad():
                    piece.select(shard.param.data).copy_(piece.block_of(rolled))
