"""Rectangular blocks of tensors: what a rank holds, what a file holds, and where the two overlap.

Layouts cut a logical tensor differently: by heads, by halves of a gate, by experts, and, in the
distributed optimizer, at arbitrary elements. Here every cut is a set of blocks: a *view*, which is
a shape with as many elements as the tensor, and an offset and a size for each of its dimensions.
Two blocks with different views are compared in the coarsest view that refines both. A checkpoint
therefore stores no layout, and no rank ever gathers a whole tensor.

    logical [6, 5], saved: rows 0..2     Block(view=(6, 5), offsets=(0, 0), sizes=(3, 5))
    needed: row 1 of both halves         Block(view=(2, 3, 5), offsets=(0, 1, 0), sizes=(2, 1, 5))
    common view (2, 3, 5), overlap       row 1 of half 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor

Shape = tuple[int, ...]
MODEL = "model"
"""The kind of the weights; other kinds are optimizer state, or scales of FP8 (`fp8_scales.py`)."""


@dataclass(frozen=True)
class Block:
    """A rectangle in a tensor of shape `view`."""

    view: Shape
    """Shape of the whole tensor; any shape with as many elements as the logical one."""
    offsets: Shape
    """First index of the block in each dimension of the view."""
    sizes: Shape
    """Length of the block in each dimension of the view."""

    @property
    def numel(self) -> int:
        """Number of elements in the block."""
        return prod(self.sizes)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Block:
        """All of a tensor of this shape."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    def intersection(self, other: Block) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Overlap with another block of the same view, as indices into this block and the other."""
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
        kind: `MODEL`, or a kind of optimizer state.
        name: the logical tensor.
        shape: its logical shape.
        block: which block.
        values: the block's elements, shaped ``block.sizes``; shares memory with the parameter or
            the optimizer state.
        writer: whether this rank saves it, provided that it saves the parameter it belongs to.
            False for all but one of several ranks with equal state: Adafactor's means over a
            dimension that tensor parallelism splits.
    """

    kind: str
    name: str
    shape: Shape
    block: Block
    values: Tensor
    writer: bool = True


def common_view(first: Shape, second: Shape) -> Shape:
    """The coarsest shape that refines both, e.g. [2, 3, 5] for [6, 5] and [2, 3, 5].

    Args:
        first: a view of a tensor; dimensions of size 1 are ignored.
        second: another view of the same tensor.

    Raises:
        ValueError: there is none, as for [4, 6] and [6, 4].
    """
    # Factor both shapes from the left, as if they were words: the smaller of the two leading sizes
    # must divide the larger one and is the next size of the result; the quotient stays to be
    # matched. [2, 15] and [6, 5]: 2 (6 leaves 3), 3 (15 leaves 5), 5.
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
        raise ValueError(f"shapes {first} and {second} have different numbers of elements")
    return tuple(common)


def split_range(start: int, stop: int, sizes: Shape) -> list[tuple[tuple[int, int], ...]]:
    """Cut elements [start, stop) of a row-major array into boxes, in memory order.

    Args:
        start: first element of the range.
        stop: end of the range.
        sizes: shape of the array.

    Returns:
        For each box the (offset, size) of every dimension; at most 2 * len(sizes) - 1 boxes.
    """
    # Elements [3, 11) of a [3, 5] array are the end of row 0, all of row 1, the start of row 2:
    #     ((0, 1), (3, 2)), ((1, 1), (0, 5)), ((2, 1), (0, 1)).
    # A partial first and last row are ranges of a smaller array, hence the recursion.
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


def refine(block: Block, tensor: Tensor, view: Shape) -> Iterator[tuple[Block, Tensor]]:
    """Express a block as blocks of a finer view, each with its part of ``tensor``.

    Args:
        block: the block.
        tensor: its elements, shaped ``block.sizes``, in any memory layout.
        view: a shape that refines ``block.view``; see `common_view`.
    """
    # Each dimension of the coarse view is a group of dimensions of the fine one, and the block's
    # interval in it is a range of a row-major array of the group's sizes: `split_range` gives its
    # boxes. A block of the fine view takes one box from every group. Rows 1..4 of [6, 5] in the
    # view [2, 3, 5] are rows 1..2 of half 0 and rows 0..1 of half 1:
    #     groups        (2, 3)                              (5,)
    #     boxes         ((0, 1), (1, 2)), ((1, 1), (0, 2))  ((0, 5),)
    #     fine blocks   offsets (0, 1, 0) sizes (1, 2, 5) and offsets (1, 0, 0) sizes (1, 2, 5)
    kept = [i for i, n in enumerate(block.view) if n != 1]
    tensor = tensor.squeeze(tuple(i for i, n in enumerate(block.view) if n == 1))
    groups = _groups([block.view[i] for i in kept], view)
    cuts = []
    for i, group in zip(kept, groups, strict=True):
        cuts.append(split_range(block.offsets[i], block.offsets[i] + block.sizes[i], group))
    for boxes in product(*cuts):
        part = tensor
        # From the last dimension to the first: `unflatten` inserts dimensions after this one, so
        # that the numbers of the dimensions still to be cut stay valid.
        for dim in reversed(range(len(boxes))):
            inner = [prod(groups[dim][j + 1 :]) for j in range(len(groups[dim]))]
            first = sum(o * n for (o, _), n in zip(boxes[dim], inner, strict=True))
            sizes = [size for _, size in boxes[dim]]
            part = part.narrow(dim, first - block.offsets[kept[dim]], prod(sizes))
            part = part.unflatten(dim, sizes)
        flat = [pair for box in boxes for pair in box]
        yield Block(view, tuple(o for o, _ in flat), tuple(s for _, s in flat)), part


def _groups(coarse: Sequence[int], fine: Shape) -> list[Shape]:
    """The sizes of the finer view that make up each size of the coarser one."""
    rest: list[int] = list(fine)
    groups: list[Shape] = []
    for size in coarse:
        group: list[int] = []
        while prod(group) < size:
            group.append(rest.pop(0))
        groups.append(tuple(group))
    return groups


def copy_overlap(source: Block, values: Tensor, target: Block, out: Tensor) -> int:
    """Copy the elements that two blocks of one tensor have in common.

    Args:
        source: the block in ``values``.
        values: its elements, shaped ``source.sizes``.
        target: the block in ``out``.
        out: its elements, shaped ``target.sizes``, of the same dtype; overwritten in the overlap.

    Returns:
        Number of elements copied.

    Raises:
        ValueError: the two views have no common refinement.
    """
    if source.view == target.view:
        shared = source.intersection(target)
        if shared is None:
            return 0
        part = out[shared[1]]
        part.copy_(values[shared[0]])
        return part.numel()
    view = common_view(source.view, target.view)
    targets = list(refine(target, out, view))
    return sum(
        copy_overlap(a, values_a, b, out_b)
        for a, values_a in refine(source, values, view)
        for b, out_b in targets
    )
