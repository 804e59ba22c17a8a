"""Rectangular blocks of tensors: what a rank holds, what a file holds, and where they meet.

A logical tensor is cut differently by every layout: by heads, halves, experts, and by the
distributed optimizer at any element. Here all of these become blocks: a tensor seen in some *view*
shape, and in it a start and a size per dimension. A flat range of a local parameter is a few such
blocks (`ranges.py`), and two views of the same tensor meet in the coarsest that refines both. So
a checkpoint needs to know nothing of layouts, and no tensor is ever gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor seen in the shape `view`."""

    view: Shape
    """Shape the whole tensor is seen in; as many elements as the tensor has."""
    offsets: Shape
    """First element of the part, for each dimension of the view."""
    sizes: Shape
    """Elements of the part, for each dimension of the view."""

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return prod(self.sizes)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Block:
        """All of a tensor of this shape."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    def intersection(self, other: Block) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What this block shares with another of the same view, as indices into each of them."""
        mine, theirs = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if start >= stop:
                return None
            mine.append(slice(start - a, stop - a))
            theirs.append(slice(start - b, stop - b))
        return tuple(mine), tuple(theirs)


@dataclass(frozen=True)
class Part:
    """A block of a logical tensor in this rank's memory.

    Args:
        kind: `model`, or a kind of optimizer state.
        name: the logical tensor.
        shape: its logical shape.
        block: which block.
        values: the block, shaped ``block.sizes``: a view of the parameter or of optimizer state.
        writer: whether this rank writes it, if it writes the parameter that it belongs to: means
            over a dimension that tensor parallelism splits are the same on all of its ranks.
    """

    kind: str
    name: str
    shape: Shape
    block: Block
    values: Tensor
    writer: bool = True


def common_view(first: Shape, second: Shape) -> Shape:
    """The coarsest shape that splits dimensions of both: [6, 5] and [2, 3, 5] meet in [2, 3, 5].

    Raises:
        ValueError: there is none, as for [4, 6] and [6, 4].
    """
    a, b = [n for n in first if n != 1], [n for n in second if n != 1]
    common = []
    while a and b:
        larger, smaller = (a, b) if a[0] >= b[0] else (b, a)
        whole, part = larger.pop(0), smaller.pop(0)
        if whole % part:
            raise ValueError(f"shapes {first} and {second} cut a tensor in incompatible ways")
        common.append(part)
        if whole > part:
            larger.insert(0, whole // part)
    if a or b:
        raise ValueError(f"shapes {first} and {second} are not of the same tensor")
    return tuple(common)


def split_range(start: int, stop: int, sizes: Shape) -> list[tuple[tuple[int, int], ...]]:
    """Cut elements [start, stop) of a row-major array of these sizes into boxes, in order.

    Returns:
        For each box the (offset, size) of every dimension; at most 2 * len(sizes) - 1 boxes.
    """
    if start >= stop:
        return []
    if not sizes:
        return [()]
    inner = prod(sizes[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        rest = split_range(start - first * inner, stop - first * inner, sizes[1:])
        return [((first, 1), *box) for box in rest]
    boxes = []
    if start % inner:
        head = split_range(start % inner, inner, sizes[1:])
        boxes += [((first, 1), *box) for box in head]
        first += 1
    full = stop // inner
    if full > first:
        boxes.append(((first, full - first), *((0, size) for size in sizes[1:])))
    tail = split_range(0, stop % inner, sizes[1:])
    return boxes + [((full, 1), *box) for box in tail]


def refined(block: Block, tensor: Tensor, view: Shape) -> Iterator[tuple[Block, Tensor]]:
    """A block as blocks of a finer view, each with the part of ``tensor`` that it is.

    Args:
        block: the block.
        tensor: its elements, shaped ``block.sizes``, in any memory layout.
        view: a shape that splits dimensions of ``block.view``; see `common_view`.
    """
    kept = [i for i, n in enumerate(block.view) if n != 1]
    tensor = tensor.squeeze(tuple(i for i, n in enumerate(block.view) if n == 1))
    groups = _grouped([block.view[i] for i in kept], view)
    cuts = []
    for i, group in zip(kept, groups, strict=True):
        cuts.append(split_range(block.offsets[i], block.offsets[i] + block.sizes[i], group))
    for boxes in product(*cuts):
        part = tensor
        for dim in reversed(range(len(boxes))):
            inner = [prod(groups[dim][j + 1 :]) for j in range(len(groups[dim]))]
            first = sum(o * n for (o, _), n in zip(boxes[dim], inner, strict=True))
            sizes = [size for _, size in boxes[dim]]
            part = part.narrow(dim, first - block.offsets[kept[dim]], prod(sizes))
            part = part.unflatten(dim, sizes)
        flat = [pair for box in boxes for pair in box]
        yield Block(view, tuple(o for o, _ in flat), tuple(s for _, s in flat)), part


def _grouped(coarse: Sequence[int], fine: Shape) -> list[Shape]:
    """Which dimensions of the finer view make up each dimension of the coarser one."""
    rest: list[int] = list(fine)
    groups: list[Shape] = []
    for size in coarse:
        group: list[int] = []
        while prod(group) < size:
            group.append(rest.pop(0))
        groups.append(tuple(group))
    return groups


def copy_overlap(source: Block, values: Tensor, target: Block, out: Tensor) -> int:
    """Copy what two blocks of one tensor share.

    Args:
        source: the block that ``values`` holds, shaped ``source.sizes``.
        values: where to read.
        target: the block that ``out`` holds, shaped ``target.sizes``.
        out: where to write; same dtype.

    Returns:
        Elements copied.
    """
    if source.view == target.view:
        shared = source.intersection(target)
        if shared is None:
            return 0
        part = out[shared[1]]
        part.copy_(values[shared[0]])
        return part.numel()
    view = common_view(source.view, target.view)
    targets = list(refined(target, out, view))
    return sum(
        copy_overlap(a, values_a, b, out_b)
        for a, values_a in refined(source, values, view)
        for b, out_b in targets
    )
