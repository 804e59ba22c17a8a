"""What this rank must write, and what it must read: blocks of logical tensors in its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.model.sharding.blocks import Part
from megatron_moe.model.sharding.optimizer_state import OptimizerShard
from megatron_moe.model.sharding.ranges import piece_blocks
from megatron_moe.model.sharding.shards import ParamShard

MODEL = "model"
"""The kind of the weights; every other kind is optimizer state."""


@dataclass(frozen=True)
class Replicas:
    """This rank among the ranks that hold the same parameters.

    Args:
        dense: rank and size of the data-parallel group of dense parameters.
        expert: likewise of experts.
    """

    dense: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


def held(
    shards: Iterable[ParamShard], states: dict[Tensor, OptimizerShard] | None
) -> Iterator[Part]:
    """Everything in this rank's memory: what a load must fill."""
    for shard in shards:
        yield from _of_param(shard)
        if states is not None and shard.param in states:
            yield from _of_state(shard, states[shard.param])


def owned(
    shards: Sequence[ParamShard],
    states: dict[Tensor, OptimizerShard] | None,
    replicas: Replicas,
) -> Iterator[Part]:
    """What this rank writes: of every set of replicas, one writes.

    Data-parallel replicas share the work: each parameter, with its state unless that is sharded
    anyway, goes to the one that has the least to write so far. All know the same list, so this
    needs no communication.
    """
    loads = {True: [0] * replicas.expert[1], False: [0] * replicas.dense[1]}
    for shard in sorted(shards, key=lambda shard: -shard.param.numel()):
        rank = replicas.expert[0] if shard.expert else replicas.dense[0]
        load = loads[shard.expert]
        chosen = load.index(min(load))
        load[chosen] += shard.param.numel()
        if not shard.writer:
            continue
        state = states.get(shard.param) if states is not None else None
        if chosen == rank:
            yield from _of_param(shard)
        if state is not None and (state.sharded or chosen == rank):
            yield from (part for part in _of_state(shard, state) if part.writer)


def _of_param(shard: ParamShard) -> Iterator[Part]:
    yield from _parts(MODEL, shard, shard.param.detach().view(-1), 0)


def _of_state(shard: ParamShard, state: OptimizerShard) -> Iterator[Part]:
    for kind, flat in state.tensors.items():
        yield from _parts(kind, shard, flat, state.start)
    yield from state.parts


def _parts(kind: str, shard: ParamShard, flat: Tensor, start: int) -> Iterator[Part]:
    for piece in shard.pieces:
        shape = tuple(piece.logical_shape)
        for block, values in piece_blocks(piece, shard.param.shape, flat, start):
            yield Part(kind, piece.name, shape, block, values)
