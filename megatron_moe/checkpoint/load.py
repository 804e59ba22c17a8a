"""Load a checkpoint into any layout; each rank reads the blocks that it needs.

open            rank 0 reads the JSON files and broadcasts them
plan            each rank: the blocks of its parameters and optimizer state
check, verify   differences of configuration and tensors; checksums of all files
fill            each rank: its blocks, from the mapped files; step count; random states
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint import rng
from megatron_moe.checkpoint.compare import (
    config_differences,
    identity_differences,
    tensor_differences,
    wanted_tensors,
)
from megatron_moe.checkpoint.contents import RANDOM, all_ranks, rank_file
from megatron_moe.checkpoint.directory import step_directory
from megatron_moe.checkpoint.metadata import (
    CheckpointMetadata,
    JsonFiles,
    RunIdentity,
    TrainState,
    parse_json_files,
    read_json_files,
)
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.checkpoint.select import FIXES, SelectedCheckpoint, verify_tensors
from megatron_moe.checkpoint.tensor_files import TensorFiles
from megatron_moe.config import RunConfig
from megatron_moe.errors import CheckpointError, Corrupt, with_fixes
from megatron_moe.model.sharding.blocks import MODEL, Part
from megatron_moe.model.sharding.fp8_scales import scale_parts
from megatron_moe.model.sharding.optimizer_state import optimizer_shards, set_optimizer_step
from megatron_moe.model.sharding.parts import load_plan
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.text import json_value

_log = logging.getLogger(__name__)

_FILLING_THREADS = 4
"""Threads that copy blocks from the page cache."""


@with_fixes(FIXES)
def load_checkpoint(
    directory: str | Path,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    step: int | None = None,
    selected: SelectedCheckpoint | None = None,
    with_optimizer: bool = True,
    with_rng: bool = True,
    identity: RunIdentity | None = None,
    data_differences: Sequence[str] = (),
) -> TrainState:
    """Load a step into model, optimizer and generators; called by all ranks together.

    The layout may differ from the one that saved. Nothing is changed until every check, checksums
    included, has passed on every rank.

    Args:
        directory: of the run's checkpoints, shared by all ranks.
        config: this run's configuration; with ``checkpoint.finetune`` it may differ from the saved
            one in everything that does not change shapes.
        ctx: this rank's place in the layout.
        chunks: model chunks of this rank, in Megatron-Core's wrappers or bare.
        optimizer: Megatron-Core's, or None.
        step: by default the one that the tracker names.
        selected: the step to load, from `select_checkpoint`; then ``step`` is ignored.
        with_optimizer: load optimizer state; otherwise masters are set from the weights.
        with_rng: load random states; on another layout than the saved one new ones are derived
            (see `megatron_moe.checkpoint.rng`).
        identity: this run's, to be compared with the checkpoint's.
        data_differences: if the training data differs, in what, one line each; by default one line
            with both fingerprints.

    Returns:
        The saved run's progress.

    Raises:
        UsageError: on every rank: there is no such checkpoint, it is damaged, or it is not
            compatible with this run.
    """
    ranks = all_ranks(ctx)
    opened = _open(Path(directory), step, selected, ranks)
    loaded_optimizer = optimizer if with_optimizer else None

    def plan() -> list[Part]:
        states = optimizer_shards(loaded_optimizer) if loaded_optimizer is not None else None
        found = list(load_plan(model_shards(chunks, config.model, config.moe), states))
        scales = scale_parts(chunks, config)
        return [*found, *(part for part in scales if _has(opened, part))]

    parts = ranks.run_on_all(plan)
    wanted = ranks.gather(wanted_tensors(parts))

    def check() -> None:
        if wanted is not None:  # on rank 0, which reports all differences of all ranks at once
            lines = _identity_lines(opened, config, identity, data_differences)
            _check_compatible(opened, config, lines, wanted, with_rng, loaded_optimizer)

    ranks.run_on_all(check)
    if selected is None or not selected.verified:
        verify_tensors(opened, ranks)
    ranks.run_on_all(lambda: _fill(opened, parts))
    if loaded_optimizer is not None:
        set_optimizer_step(loaded_optimizer, (opened.optimizer or {}).get("step"))
    elif optimizer is not None:
        # Masters of half-precision weights are still the initial ones: the first step would write
        # them over the loaded weights.
        optimizer.reload_model_params()
    if with_rng:
        ranks.run_on_all(lambda: _load_random_states(opened, config, ctx))
    return opened.train


def _open(
    directory: Path, step: int | None, selected: SelectedCheckpoint | None, ranks: RankGroup
) -> CheckpointMetadata:
    """Rank 0 finds the step's directory, reads its JSON files and broadcasts them."""

    def read() -> tuple[str, JsonFiles]:
        path = selected.path if selected is not None else step_directory(directory, step)[1]
        return str(path), read_json_files(path)

    found = ranks.broadcast(ranks.run_on_all(lambda: read() if ranks.rank == 0 else None))
    return ranks.run_on_all(lambda: parse_json_files(Path(found[0]), found[1]))


def _has(opened: CheckpointMetadata, part: Part) -> bool:
    """Whether a checkpoint has a tensor of the shape.

    Scales of FP8 start anew where it has none, because it was in bf16 or another recipe, or where
    the history has another length.
    """
    saved = opened.tensors.get((part.kind, part.name))
    return saved is not None and saved.shape == part.shape


def _identity_lines(
    opened: CheckpointMetadata,
    config: RunConfig,
    identity: RunIdentity | None,
    data_differences: Sequence[str],
) -> list[str]:
    """Differences of vocabulary, tokenizer and data, the data's in detail where they are known."""
    if identity is None:
        return []
    if config.checkpoint.finetune:
        return list(identity_differences(opened.identity, identity, resume=False))
    if data_differences:
        identity = replace(identity, data_fingerprint=opened.identity.data_fingerprint)
    found = identity_differences(opened.identity, identity, resume=True)
    return [*found, *data_differences]


def _check_compatible(
    opened: CheckpointMetadata,
    config: RunConfig,
    identity_lines: Sequence[str],
    wanted: list[list[list[Any]]],
    with_rng: bool,
    optimizer: Any,
) -> None:
    """Check that this run can load the checkpoint, and resume it unless it is a finetuning.

    Raises:
        CheckpointError: with a line for each difference.
    """
    resume, with_optimizer = not config.checkpoint.finetune, optimizer is not None
    lines = list(config_differences(opened.config, config, resume=resume, optimizer=with_optimizer))
    lines += [line for line in identity_lines if line not in lines]
    if with_optimizer and opened.optimizer is None:
        lines.append("no optimizer state in the checkpoint; --no-load-optim leaves it out")
        # One line is enough: not another one for every kind of state.
        wanted = [[entry for entry in rank if entry[0] == MODEL] for rank in wanted]
    if with_rng and opened.random is None:
        lines.append("no random states in the checkpoint; --no-load-rng leaves them out")
    lines += tensor_differences(opened.tensors, (entry for rank in wanted for entry in rank))
    if lines:
        found = f"{len(lines)} differences"
        expected = "compatible with this model" + (" and this run" if resume else "")
        raise CheckpointError(f"checkpoint {opened.path}", found, expected, "", lines)


def _fill(opened: CheckpointMetadata, parts: Sequence[Part]) -> None:
    """Copy every block from the mapped files, several at a time."""

    def some(share: Sequence[Part]) -> None:
        reader = TensorReader(opened.path, opened.tensors)
        with torch.no_grad():  # the setting is per thread
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
            message = "random states are of layout %s; new ones are derived from seed and step"
            _log.warning(message, opened.random)
        rng.reseed(config.train.seed, iteration, ctx)
        return
    file = rank_file(ctx.rank)
    text = TensorFiles(opened.path).metadata(file).get(RANDOM)
    try:
        states = json_value(text or "")
    except ValueError:
        what, expected = f"random states in {opened.path / file}", "those of a save"
        raise Corrupt(what, "missing or malformed", expected) from None
    rng.restore(states, str(opened.path / file))
