"""The rows and columns of this rank's block of a logical tensor, as Adafactor needs them.

A logical tensor is a vector [N], a matrix [R, C], or a stack of experts' matrices [E, R, C]. The
block of it that a rank holds is shaped by the table of `model/sharding/shards.py`, in a view that
may split each of these dimensions (a gate's rows into two halves, a query's into heads). Here each
logical dimension is mapped to the dimensions of the view that it consists of. A sum over the
columns is then a sum over those, and complete once it is all-reduced over the ranks that split
them. Example: a gate [2F, H], viewed as [2, F, H], has rows (0, 1) and columns (2,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_moe.model.sharding.blocks import Block, Part
from megatron_moe.model.sharding.shards import Piece
from megatron_moe.training.optim.squares import squares

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Factoring:
    """How the matrices of a logical tensor lie in the view of a piece.

    Args:
        piece: the block.
        groups: for each logical dimension, the dimensions of the view that it consists of.
        expert: whether the first logical dimension is the expert, each with a separate matrix.
        min_dim: a matrix is factored if neither R nor C is below this.
    """

    piece: Piece
    groups: tuple[Dims, ...]
    expert: bool
    min_dim: int

    @classmethod
    def of(cls, piece: Piece, *, expert: bool, min_dim: int) -> Factoring:
        """Derive the groups from the shapes of a piece."""
        return cls(piece, split_dims(piece.logical_shape, piece.view_shape), expert, min_dim)

    @property
    def batch(self) -> Dims:
        """Logical dimensions that enumerate matrices."""
        return (0,) if self.expert else ()

    @property
    def matrix(self) -> Dims:
        """Logical dimensions of one matrix or vector."""
        return tuple(range(len(self.batch), len(self.groups)))

    @property
    def factored(self) -> bool:
        """Whether row and column means replace the full second moment."""
        sizes = [self.piece.logical_shape[dim] for dim in self.matrix]
        return len(sizes) == 2 and min(sizes) >= self.min_dim

    @property
    def row(self) -> int:
        """The logical dimension of rows."""
        return self.matrix[0]

    @property
    def column(self) -> int:
        """The logical dimension of columns."""
        return self.matrix[-1]

    def extent(self, logical: Sequence[int]) -> int:
        """Elements of the whole tensor along these logical dimensions."""
        return prod(self.piece.logical_shape[dim] for dim in logical)

    def is_split(self, logical: Sequence[int]) -> bool:
        """Whether other ranks hold other parts of these logical dimensions."""
        sizes, view = self.piece.sizes, self.piece.view_shape
        return any(sizes[dim] < view[dim] for dim in self._dims(logical))

    def squares(self, block: Tensor, logical: Sequence[int]) -> Tensor:
        """Sum of squares over these logical dimensions, kept with size 1; fp64, of this rank."""
        return squares(block, self._dims(logical))

    def mean(self, statistic: Tensor, logical: Sequence[int]) -> Tensor:
        """Mean over logical dimensions that are whole on this rank, kept with size 1."""
        return statistic.mean(dim=self._dims(logical), keepdim=True)

    def empty_statistic(self, logical: Sequence[int], device: torch.device) -> Tensor:
        """Zeros with one element for each place along these logical dimensions, 1 elsewhere."""
        kept = self._dims(logical)
        sizes = [n if dim in kept else 1 for dim, n in enumerate(self.piece.sizes)]
        return torch.zeros(sizes, dtype=torch.float32, device=device)

    def part(self, kind: str, logical: Sequence[int], statistic: Tensor) -> Part:
        """A statistic with these logical dimensions, as the checkpoint sees it."""
        piece, kept = self.piece, self._dims(logical)
        view, offsets, sizes = (
            tuple(values[dim] for dim in kept)
            for values in (piece.view_shape, piece.offsets, piece.sizes)
        )
        # Ranks that split the averaged dimensions all hold the same statistic; the first writes it.
        first = all(offset == 0 for dim, offset in enumerate(piece.offsets) if dim not in kept)
        return Part(
            kind=kind,
            name=piece.name,
            shape=tuple(piece.logical_shape[dim] for dim in logical),
            block=Block(view, offsets, sizes),
            values=statistic.view(sizes),
            writer=first,
        )

    def _dims(self, logical: Sequence[int]) -> Dims:
        return tuple(dim for index in logical for dim in self.groups[index])


def split_dims(shape: Sequence[int], view: Sequence[int]) -> tuple[Dims, ...]:
    """For each dimension of a shape, the dimensions of a finer view that it consists of.

    [6, 5] seen as [2, 3, 5] gives (0, 1), (2,).
    """
    groups: list[Dims] = []
    following = 0
    for size in shape:
        group: Dims = ()
        while prod(view[dim] for dim in group) < size:
            group += (following,)
            following += 1
        groups.append(group)
    return tuple(groups)
