"""Save a training run: weights, optimizer, random states, progress, configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint import rng
from megatron_moe.checkpoint.files import PLAIN_HEAD
from megatron_moe.checkpoint.reading import CONFIG, STATE
from megatron_moe.checkpoint.state import RunIdentity, TrainState, as_json
from megatron_moe.checkpoint.writer import Contents, write_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.optimizer_state import optimizer_shards, optimizer_step
from megatron_moe.model.sharding.parts import Part, Replicas, owned
from megatron_moe.model.sharding.shards import ParamShard, model_shards
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext

RANDOM = "random"
"""Key of a rank's random states in the head of its first file."""


def save_checkpoint(
    directory: str | Path,
    state: TrainState,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    metadata: RunIdentity,
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> Path:
    """Save a run; called by all ranks together.

    Args:
        directory: of the run's checkpoints, shared by all ranks.
        state: how far the run has come; ``state.iteration`` is the step's name.
        config: the run's configuration.
        ctx: this rank's place in the layout.
        chunks: model chunks of this rank, in Megatron-Core's wrappers or bare.
        optimizer: Megatron-Core's, or None together with ``with_optimizer=False``.
        metadata: what a run that loads this must share with it.
        with_optimizer: save optimizer state.
        with_rng: save random states.

    Returns:
        The new checkpoint's directory, once it is complete and the tracker names it.

    Raises:
        CheckpointError: on every rank, e.g. if the disk is full. Older checkpoints and the tracker
            are as they were.
    """
    ranks = ranks_of(ctx)
    contents = contents_of(
        state,
        config=config,
        ctx=ctx,
        chunks=chunks,
        optimizer=optimizer if with_optimizer else None,
        metadata=metadata,
        with_rng=with_rng,
        ranks=ranks,
    )
    return write_checkpoint(directory, state.iteration, ranks=ranks, **vars(contents))


def contents_of(
    state: TrainState,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    metadata: RunIdentity,
    with_rng: bool,
    ranks: RankGroup,
) -> Contents:
    """What this rank writes in a save; called by all ranks together.

    As for `save_checkpoint`, but ``optimizer`` is the one to save, or None.
    """
    _finish_parameter_gather(chunks)

    def plan() -> list[Part]:
        shards = shards_of(chunks, config)
        states = optimizer_shards(optimizer) if optimizer is not None else None
        return list(owned(shards, states, _replicas(ctx)))

    parts = ranks.run_on_all(plan)
    documents = {
        CONFIG: config.to_dict(),
        STATE: {
            "train": as_json(state),
            "metadata": as_json(metadata),
            "optimizer": _optimizer_document(optimizer, ranks),
            "random": rng.layout_of(ctx.layout) if with_rng else None,
        },
    }
    header = {**PLAIN_HEAD, **({RANDOM: json.dumps(rng.capture())} if with_rng else {})}
    return Contents(parts=parts, documents=documents, header=header)


def _optimizer_document(optimizer: Any, ranks: RankGroup) -> dict[str, Any] | None:
    """The step count that Adam corrects its bias by, the same on every rank."""
    if optimizer is None:
        return None
    steps = ranks.gather(ranks.run_on_all(lambda: optimizer_step(optimizer))) or []
    known = sorted({step for step in steps if step is not None})
    return {"step": known[0] if known else None}


def ranks_of(ctx: ParallelContext) -> RankGroup:
    """All ranks of the run."""
    return RankGroup(ctx.rank, ctx.world_size, ctx.platform.device)


def _replicas(ctx: ParallelContext) -> Replicas:
    dense, expert = ctx.pgs.dp_cp, ctx.pgs.expt_dp
    return Replicas((dense.rank(), dense.size()), (expert.rank(), expert.size()))


def shards_of(chunks: Sequence[Any], config: RunConfig) -> list[ParamShard]:
    """The table of this rank's parameters, through any wrappers of the chunks."""
    bare = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        bare.append(chunk)
    return model_shards(bare, config.model, config.moe)


def _finish_parameter_gather(chunks: Sequence[Any]) -> None:
    """With overlapped gathers, most of each parameter is stale until the next forward pass."""
    for chunk in chunks:
        settings = getattr(chunk, "ddp_config", None)
        if settings is not None and settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
