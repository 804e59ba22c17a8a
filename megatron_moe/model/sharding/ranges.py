"""Flat ranges of a local parameter, as the distributed optimizer cuts them, seen as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_moe.model.sharding.blocks import Block, Shape, split_range
from megatron_moe.model.sharding.shards import Piece


def piece_blocks(
    piece: Piece, shape: Sequence[int], flat: Tensor, start: int = 0
) -> Iterator[tuple[Block, Tensor]]:
    """The blocks of a logical tensor that lie in a flat range of a local parameter.

    Args:
        piece: a block of the logical tensor, and where it lies in the parameter.
        shape: the parameter's local shape.
        flat: elements [start, start + len) of the flattened parameter, or of something shaped like
            it (a moment, the fp32 master); one-dimensional and contiguous.
        start: where the range starts.

    Yields:
        Each block with a view of the part of ``flat`` that holds it.
    """
    local = piece.select(torch.empty(tuple(shape), device="meta"))
    base, strides = int(local.storage_offset()), local.stride()
    order = [i for i, size in enumerate(local.shape) if size > 1]
    order.sort(key=lambda i: -strides[i])
    sizes = tuple(local.shape[i] for i in order)
    steps = tuple(strides[i] for i in order)
    _require_nested(piece.name, sizes, steps)
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


def _require_nested(name: str, sizes: Shape, steps: Shape) -> None:
    """Row-major order of the dimensions must be the order in memory."""
    reach = 0
    for size, step in zip(reversed(sizes), reversed(steps), strict=True):
        if step <= reach:
            raise ValueError(f"the part of a parameter that is {name} has interleaved dimensions")
        reach += (size - 1) * step


def _elements_before(limit: int, sizes: Shape, steps: Shape) -> int:
    """How many elements of a nested strided array lie at a place below ``limit``."""
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
    return count + 1
