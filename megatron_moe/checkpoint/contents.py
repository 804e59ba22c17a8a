"""What one rank saves: its blocks of tensors, assigned to files; JSON files; random states."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_moe.checkpoint import index, rng
from megatron_moe.checkpoint.disk import Stream
from megatron_moe.checkpoint.finite import check_finite
from megatron_moe.checkpoint.index import LogicalTensor, block_key
from megatron_moe.checkpoint.metadata import CONFIG, STATE, RunIdentity, TrainState, state_json
from megatron_moe.checkpoint.tensor_files import (
    DTYPES,
    FORMAT_METADATA,
    HostMemory,
    TensorSource,
    stream_of,
)
from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.blocks import Part
from megatron_moe.model.sharding.fp8_scales import scale_parts, writes_scale
from megatron_moe.model.sharding.optimizer_state import optimizer_shards, optimizer_step
from megatron_moe.model.sharding.parts import Replicas, save_plan
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext

RANDOM = "random"
"""Key of a rank's random states in the header of its first file."""
FILE_BYTES = 96 << 20
"""Bytes of tensors for which a rank writes another file."""
MOST_FILES = 8
"""Files of one rank: a thousand ranks must not burden a shared file system with many more."""
RankFile = tuple[str, Sequence[Part]]
"""A file's name and its blocks."""


@dataclass(frozen=True, kw_only=True)
class SaveContents:
    """What one rank saves."""

    parts: Sequence[Part]
    """Blocks of tensors, in this rank's memory."""
    other_files: Mapping[str, Any]
    """File name -> JSON value, or the bytes of the file; rank 0 writes them."""
    header: Mapping[str, str]
    """Strings for the header of this rank's first file."""

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(map(_bytes, self.parts))


def collect_contents(
    state: TrainState,
    *,
    config: RunConfig,
    ctx: ParallelContext,
    chunks: Sequence[Any],
    optimizer: Any,
    identity: RunIdentity,
    with_rng: bool,
    ranks: RankGroup,
    tokenizer_files: Mapping[str, bytes] = MappingProxyType({}),
) -> SaveContents:
    """What this rank saves; called by all ranks together.

    Args:
        state: the run's progress.
        config: the run's configuration.
        ctx: this rank's place in the layout.
        chunks: model chunks of this rank, in Megatron-Core's wrappers or bare.
        optimizer: Megatron-Core's, or None to save no optimizer state.
        identity: what a run that loads this must share with it.
        with_rng: save random states.
        ranks: the ranks that save together.
        tokenizer_files: file name -> content, from `Tokenizer.files`.

    Raises:
        NonFinite: on every rank, if a tensor of any is not finite.
        CheckpointError: on every rank, if any failed.
    """
    finish_parameter_gather(chunks)

    def plan() -> list[Part]:
        shards = model_shards(chunks, config.model, config.moe)
        states = optimizer_shards(optimizer) if optimizer is not None else None
        replicas = _replicas(ctx)
        found = list(save_plan(shards, states, replicas))
        scales = scale_parts(chunks, config)
        found += [part for part in scales if writes_scale(part, chunks[0], replicas)]
        check_finite(found, state.iteration, ctx.rank)
        return found

    parts = ranks.run_on_all(plan)
    layout = rng.layout_of(ctx.layout) if with_rng else None
    state_file = state_json(
        state, identity, optimizer=_optimizer_json(optimizer, ranks), random=layout
    )
    random = {RANDOM: json.dumps(rng.capture())} if with_rng else {}
    return SaveContents(
        parts=parts,
        other_files={CONFIG: config.to_dict(), STATE: state_file, **tokenizer_files},
        header={**FORMAT_METADATA, **random},
    )


def all_ranks(ctx: ParallelContext) -> RankGroup:
    """All ranks of the run, over the default group."""
    return RankGroup(ctx.rank, ctx.world_size, ctx.platform.device)


def finish_parameter_gather(chunks: Sequence[Any]) -> None:
    """Complete every parameter of model chunks, before they are read outside of a forward pass."""
    # With overlapped gathers, most of each parameter is stale until the next forward pass.
    for chunk in chunks:
        settings = getattr(chunk, "ddp_config", None)
        if settings is not None and settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _replicas(ctx: ParallelContext) -> Replicas:
    dense, expert = ctx.pgs.dp_cp, ctx.pgs.expt_dp
    return Replicas((dense.rank(), dense.size()), (expert.rank(), expert.size()))


def _optimizer_json(optimizer: Any, ranks: RankGroup) -> dict[str, Any] | None:
    """The step count of Adam's bias correction, the same on every rank."""
    if optimizer is None:
        return None
    # With the distributed optimizer a rank may hold no parameter, and then has no count.
    steps = ranks.gather(ranks.run_on_all(lambda: optimizer_step(optimizer))) or []
    known = sorted({step for step in steps if step is not None})
    return {"step": known[0] if known else None}


def assign_to_files(parts: Iterable[Part], rank: int) -> list[RankFile]:
    """A rank's blocks in files of similar size; at least one file, even if it is empty.

    A file's SHA-256 is one sequence that a single core computes, more slowly than a good disk
    writes. Several files are hashed in parallel, in the save and in a load.
    """
    # Largest first, each block to the file with the least so far; blocks are never cut. Sizes 9, 8,
    # 7, 4, 3 over three files: [9], [8, 3], [7, 4].
    sized = sorted(parts, key=lambda part: -_bytes(part))
    count = sum(map(_bytes, sized)) // max(FILE_BYTES, 1)
    files: list[list[Part]] = [[] for _ in range(min(max(count, 1), MOST_FILES))]
    filled = [0] * len(files)
    for part in sized:
        least = filled.index(min(filled))
        files[least].append(part)
        filled[least] += _bytes(part)
    return [
        (rank_file(rank, number), blocks)
        for number, blocks in enumerate(files)
        if blocks or number == 0
    ]


def rank_file(rank: int, number: int = 0) -> str:
    """The name of a rank's file; file 0 holds its random states."""
    return f"rank-{rank:05d}" + (f"-{number}" if number else "") + ".safetensors"


def file_streams(
    files: Sequence[RankFile], header: Mapping[str, str], memory: HostMemory | None
) -> dict[str, Stream]:
    """The bytes of each of a rank's files, from its tensors or from a copy that is taken now.

    Raises:
        CheckpointError: there is not enough memory for the copy.
    """
    # Only the first file has the rank's random states; the others have the least.
    headers = [header, *[FORMAT_METADATA] * (len(files) - 1)]
    names = [name for name, _ in files]
    tensors = [[_source(part) for part in parts] for _, parts in files]
    if memory is None:
        streams = [stream_of(*file) for file in zip(tensors, headers, strict=True)]
    else:
        streams = [copy.parts for copy in memory.copy(list(zip(tensors, headers, strict=True)))]
    return dict(zip(names, streams, strict=True))


def _source(part: Part) -> TensorSource:
    return TensorSource.of(block_key(part.kind, part.name, part.block.offsets), part.values)


def rank_index(files: Iterable[RankFile]) -> dict[str, Any]:
    """The index of one rank's files, as JSON values."""
    grouped: dict[index.Name, LogicalTensor] = {}
    for file, part in ((file, part) for file, parts in files for part in parts):
        known = grouped.get((part.kind, part.name))
        blocks = (*(known.blocks if known else ()), (file, part.block))
        dtype = DTYPES[part.values.dtype]
        grouped[part.kind, part.name] = LogicalTensor(
            part.kind, part.name, part.shape, dtype, part.block.view, blocks
        )
    return index.to_json(grouped.values())


def _bytes(part: Part) -> int:
    return part.values.numel() * part.values.element_size()
