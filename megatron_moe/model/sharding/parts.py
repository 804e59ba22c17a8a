"""This rank's parameters and optimizer state as blocks: what a load fills and what a save writes.

Both plans come from the table of shards (`shards.py`) and the optimizer's flat state
(`optimizer_state.py`). A load needs everything in this rank's memory. A save writes each block
once: of the ranks with the same block, one is chosen, without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_moe.model.sharding.blocks import MODEL, Block, Part, Shape, split_range
from megatron_moe.model.sharding.optimizer_state import OptimizerShard
from megatron_moe.model.sharding.shards import ParamShard, Piece


@dataclass(frozen=True)
class Replicas:
    """This rank's place among the data-parallel replicas of its parameters.

    Args:
        dense: rank and size of the data-parallel group of dense parameters.
        expert: rank and size of that of expert parameters.
    """

    dense: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


def load_plan(
    shards: Iterable[ParamShard], states: dict[Tensor, OptimizerShard] | None
) -> Iterator[Part]:
    """Every block in this rank's memory; a load fills all of them.

    Args:
        shards: the table of this rank's parameters.
        states: optimizer state by parameter, or None for weights alone.
    """
    for shard in shards:
        yield from _param_parts(shard)
        if states is not None and shard.param in states:
            yield from _state_parts(shard, states[shard.param])


def save_plan(
    shards: Sequence[ParamShard],
    states: dict[Tensor, OptimizerShard] | None,
    replicas: Replicas,
) -> Iterator[Part]:
    """The blocks that this rank writes; over all ranks, every element exactly once.

    Args:
        shards: the table of this rank's parameters.
        states: optimizer state by parameter, or None for weights alone.
        replicas: this rank's place among its data-parallel replicas.
    """
    # Data-parallel replicas hold the same list of parameters, so each computes the whole
    # assignment: largest first, to the replica with the least so far. Sizes 48, 6 over three
    # replicas give 48 -> 0, 6 -> 1. Sharded state is different on each replica and stays put.
    loads = {True: [0] * replicas.expert[1], False: [0] * replicas.dense[1]}
    for shard in sorted(shards, key=lambda shard: -shard.param.numel()):
        rank = replicas.expert[0] if shard.expert else replicas.dense[0]
        load = loads[shard.expert]
        assigned = load.index(min(load))
        load[assigned] += shard.param.numel()
        if not shard.writer:
            continue
        state = states.get(shard.param) if states is not None else None
        if assigned == rank:
            yield from _param_parts(shard)
        if state is not None and (state.sharded or assigned == rank):
            yield from (part for part in _state_parts(shard, state) if part.writer)


def _param_parts(shard: ParamShard) -> Iterator[Part]:
    yield from _flat_parts(MODEL, shard, shard.param.detach().view(-1), 0)


def _state_parts(shard: ParamShard, state: OptimizerShard) -> Iterator[Part]:
    for kind, flat in state.tensors.items():
        yield from _flat_parts(kind, shard, flat, state.start)
    yield from state.parts


def _flat_parts(kind: str, shard: ParamShard, flat: Tensor, start: int) -> Iterator[Part]:
    for piece in shard.pieces:
        shape = tuple(piece.logical_shape)
        for block, values in piece_blocks(piece, shard.param.shape, flat, start):
            yield Part(kind, piece.name, shape, block, values)


def piece_blocks(
    piece: Piece, shape: Sequence[int], flat: Tensor, start: int = 0
) -> Iterator[tuple[Block, Tensor]]:
    """The blocks of a logical tensor in a flat range of a local parameter.

    The distributed optimizer gives each data-parallel rank a range of the flattened parameter, cut
    at any element. The range is at most 2d - 1 blocks of a d-dimensional piece.

    Args:
        piece: the logical tensor's block, and where it is in the parameter.
        shape: the parameter's local shape.
        flat: elements [start, start + len) of the flattened parameter, or of a tensor of the same
            layout (a moment, the fp32 master); one-dimensional and contiguous.
        start: first element of the range.

    Yields:
        Each block with its elements, a view of ``flat``.

    Raises:
        ValueError: the piece is not a nested strided part of the parameter.
    """
    # A fused parameter [2 * 3, 4] holds gate (rows 0..2) and up (rows 3..5). Of the range
    # [10, 18), the first two elements are the end of gate's row 2, the next four are up's row 0,
    # the last two the start of up's row 1:
    #     gate   box ((2, 1), (2, 2))                         memory 10..11, flat 0..1
    #     up     boxes ((0, 1), (0, 4)), ((1, 1), (0, 2))     memory 12..17, flat 2..7
    # `select` on a meta tensor gives the piece's place in memory: an offset and strides, here 12
    # and (4, 1) for up. The range's ends are translated into positions within the piece, counted
    # in its memory order, where the range is contiguous again; `split_range` cuts it into boxes.
    local = piece.select(torch.empty(tuple(shape), device="meta"))
    base, strides = int(local.storage_offset()), local.stride()
    order = [i for i, size in enumerate(local.shape) if size > 1]
    order.sort(key=lambda i: -strides[i])
    sizes = tuple(local.shape[i] for i in order)
    steps = tuple(strides[i] for i in order)
    _check_nested(piece.name, sizes, steps)
    first = _elements_before(start - base, sizes, steps)
    last = _elements_before(start + flat.numel() - base, sizes, steps)
    for box in split_range(first, last, sizes):
        offsets, extent = [0] * local.dim(), [1] * local.dim()
        for i, (offset, size) in zip(order, box, strict=True):
            offsets[i], extent[i] = offset, size
        where = base - start + sum(o * s for o, s in zip(offsets, strides, strict=True))
        placed = tuple(a + b for a, b in zip(piece.offsets, offsets, strict=True))
        block = Block(tuple(piece.view_shape), placed, tuple(extent))
        yield block, flat.as_strided(extent, strides, flat.storage_offset() + where)


def _check_nested(name: str, sizes: Shape, steps: Shape) -> None:
    """Raise unless sorting dimensions by stride sorts elements by address.

    Each stride must be larger than the reach of all smaller dimensions together.
    """
    reach = 0
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if step <= reach:
            raise ValueError(f"piece {name} of a parameter has interleaved dimensions")
        reach += (size - 1) * step


def _elements_before(limit: int, sizes: Shape, steps: Shape) -> int:
    """Number of elements of a nested strided array at addresses below ``limit``.

    Args:
        limit: an address relative to the first element; may be outside the array or in a gap.
        sizes: of the dimensions, from the largest stride to the smallest.
        steps: their strides.
    """
    # q of two heads in [N=2, 3, D=4]: sizes (2, 4), strides (12, 1), addresses 0..3 and 12..15.
    #     limit 2    0 whole heads, rest 2: 2 of the first head's elements          -> 2
    #     limit 7    0 whole heads, rest 7 >= 4: in the gap, all 4 of the first head -> 4
    #     limit 14   1 whole head (4), rest 2: 2 more                               -> 6
    count, rest = 0, limit
    if rest <= 0:
        return 0
    for i, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        inner = prod(sizes[i + 1 :])
        rows = rest // step
        if rows >= size:
            return count + size * inner
        count += rows * inner
        rest -= rows * step
        if rest == 0:
            return count
    # An innermost stride above 1 leaves a remainder past the last counted element: one more.
    return count + 1
