"""Load a checkpoint into any layout, each rank reading the blocks that it needs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint import rng
from megatron_moe.checkpoint.compare import (
    config_differences,
    metadata_differences,
    tensor_differences,
    wanted_tensors,
)
from megatron_moe.checkpoint.directory import step_directory
from megatron_moe.checkpoint.index import TensorReader
from megatron_moe.checkpoint.mapped import TensorFiles
from megatron_moe.checkpoint.rank_files import rank_file
from megatron_moe.checkpoint.reading import (
    CheckpointMetadata,
    Documents,
    opened_from,
    read_documents,
)
from megatron_moe.checkpoint.save import RANDOM, ranks_of, shards_of
from megatron_moe.checkpoint.select import SelectedCheckpoint, verify_tensors
from megatron_moe.checkpoint.state import RunIdentity, TrainState
from megatron_moe.config import RunConfig
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.sharding.optimizer_state import optimizer_shards, set_optimizer_step
from megatron_moe.model.sharding.parts import Part, held
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext

_log = logging.getLogger(__name__)

_FILLING_THREADS = 4


def load_checkpoint(
    directory: str | Path,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    step: int | None = None,
    chosen: SelectedCheckpoint | None = None,
    with_optimizer: bool = True,
    with_rng: bool = True,
    metadata: RunIdentity | None = None,
) -> TrainState:
    """Load a step into model, optimizer and generators; called by all ranks together.

    The layout may be any other than the one that saved. Nothing is changed before every check,
    checksums included, has passed on every rank.

    Args:
        directory: of the run's checkpoints, shared by all ranks.
        config: this run's configuration; with ``checkpoint.finetune`` it may differ from the saved
            one wherever shapes allow.
        ctx: this rank's place in the layout.
        chunks: model chunks of this rank, in Megatron-Core's wrappers or bare.
        optimizer: Megatron-Core's, or None.
        step: by default the one that the tracker names.
        chosen: the step's directory, if it was chosen before.
        with_optimizer: load optimizer state; otherwise masters are set from the weights.
        with_rng: load random states; on another layout than the saved one they are derived anew
            (see `megatron_moe.checkpoint.rng`).
        metadata: this run's, to be compared with the checkpoint's.

    Raises:
        UsageError: on every rank: there is no checkpoint, it is damaged, or it does not fit.
    """
    ranks = ranks_of(ctx)
    opened = _open(Path(directory), step, chosen, ranks)
    loaded_optimizer = optimizer if with_optimizer else None

    def plan() -> list[Part]:
        states = optimizer_shards(loaded_optimizer) if loaded_optimizer is not None else None
        return list(held(shards_of(chunks, config), states))

    parts = ranks.run_on_all(plan)
    wanted = ranks.gather(wanted_tensors(parts))
    ranks.run_on_all(
        lambda: (
            _require_fit(opened, config, metadata, wanted or [], with_rng, loaded_optimizer)
            if ranks.rank == 0
            else None
        )
    )
    if chosen is None or not chosen.verified:
        verify_tensors(opened, ranks)
    ranks.run_on_all(lambda: _fill(opened, parts))
    if loaded_optimizer is not None:
        set_optimizer_step(loaded_optimizer, (opened.optimizer or {}).get("step"))
    elif optimizer is not None:
        optimizer.reload_model_params()
    if with_rng:
        ranks.run_on_all(lambda: _load_random_states(opened, config, ctx))
    return opened.train


def _open(
    directory: Path, step: int | None, chosen: SelectedCheckpoint | None, ranks: RankGroup
) -> CheckpointMetadata:
    """Rank 0 chooses the directory and reads its small files, and tells the others."""

    def read() -> tuple[str, Documents]:
        path = chosen.path if chosen is not None else step_directory(directory, step)[1]
        return str(path), read_documents(path)

    told = ranks.broadcast(ranks.run_on_all(lambda: read() if ranks.rank == 0 else None))
    return ranks.run_on_all(lambda: opened_from(Path(told[0]), told[1]))


def _require_fit(
    opened: CheckpointMetadata,
    config: RunConfig,
    metadata: RunIdentity | None,
    wanted: list[list[list[Any]]],
    with_rng: bool,
    optimizer: Any,
) -> None:
    """All that keeps this run from continuing that one.

    Raises:
        CheckpointError: with a line for each difference.
    """
    resume, with_optimizer = not config.checkpoint.finetune, optimizer is not None
    lines = list(config_differences(opened.config, config, resume=resume, optimizer=with_optimizer))
    if metadata is not None:
        lines += metadata_differences(opened.metadata, metadata, resume=resume)
    if with_optimizer and opened.optimizer is None:
        lines.append("no optimizer state in the checkpoint; --no-load-optim leaves it out")
        wanted = [[entry for entry in rank if entry[0] == "model"] for rank in wanted]
    if with_rng and opened.random is None:
        lines.append("no random states in the checkpoint; --no-load-rng leaves them out")
    lines += tensor_differences(opened.tensors, (entry for rank in wanted for entry in rank))
    if lines:
        found = f"{len(lines)} differences"
        expected = "a checkpoint of this model" + (" and this run" if resume else "")
        raise CheckpointError(f"checkpoint {opened.path}", found, expected, "", lines)


def _fill(opened: CheckpointMetadata, parts: Sequence[Part]) -> None:
    """Read every part straight from the mapped files, a few at a time."""

    def some(share: Sequence[Part]) -> None:
        reader = TensorReader(opened.path, opened.tensors)
        with torch.no_grad():  # it holds for a thread
            for part in share:
                reader.fill(part.kind, part.name, part.block, part.values)

    threads = min(_FILLING_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, (parts[i::threads] for i in range(threads))))


def _load_random_states(
    opened: CheckpointMetadata, config: RunConfig, ctx: ParallelContext
) -> None:
    iteration = opened.train.iteration
    if opened.random != rng.layout_of(ctx.layout):
        if ctx.rank == 0:
            message = "random states of layout %s do not fit this one; derived from seed and step"
            _log.warning(message, opened.random)
        rng.reseed(config.train.seed, iteration, ctx)
        return
    file = rank_file(ctx.rank)
    text = TensorFiles(opened.path).metadata(file).get(RANDOM)
    try:
        states = json.loads(text or "")
    except (ValueError, RecursionError):
        raise Corrupt(str(opened.path / file), "no random states", "what a save writes") from None
    rng.restore(states, str(opened.path / file))
