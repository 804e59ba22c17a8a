"""Tensors that are read when they are needed, a part at a time, so that memory stays bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.tensor_files import TensorSource

PART_BYTES = 512 << 20
"""About how much of a tensor is in memory at a time."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor somewhere else.

    Args:
        shape: of the whole.
        dtype: of its elements.
        rows: reads rows [start, stop) of the first dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.shape[0])

    def parts(self, step: int | None = None) -> Iterator[Tensor]:
        """Its rows in order, ``step`` at a time, by default about `PART_BYTES`."""
        if step is None:
            step = max(1, PART_BYTES // max(1, self.bytes // max(1, self.shape[0])))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))

    def pending(self, key: str, progress: Callable[[int], Any] | None = None) -> TensorSource:
        """To be written under a key; ``progress`` is told the bytes of each part."""

        def parts() -> Iterator[Tensor]:
            for part in self.parts():
                yield part
                if progress is not None:
                    progress(part.numel() * part.element_size())

        return TensorSource(key, self.dtype, self.shape, parts)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The same values, rounded to another dtype."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda start, stop: self.rows(start, stop).to(dtype))

    def digest(self) -> str:
        """SHA-256 of shape, dtype and elements."""
        found = hashlib.sha256(f"{self.shape} {self.dtype}".encode())
        for part in self.parts():
            raw: Any = part.contiguous().view(-1).view(torch.uint8).numpy()
            found.update(raw)
        return found.hexdigest()


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory anyway."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


def stacked(each: Sequence[LazyTensor], transposed: bool) -> LazyTensor:
    """Matrices of the same shape as one tensor [len(each), ...], each transposed if so asked."""
    shape = each[0].shape[::-1] if transposed else each[0].shape

    def rows(start: int, stop: int) -> Tensor:
        matrices = (tensor.whole() for tensor in each[start:stop])
        return torch.stack([m.t() if transposed else m for m in matrices])

    return LazyTensor((len(each), *shape), each[0].dtype, rows)


def row_of(tensor: LazyTensor, row: int, transposed: bool) -> LazyTensor:
    """One matrix of a stack, transposed if so asked."""
    shape = tensor.shape[:0:-1] if transposed else tensor.shape[1:]

    def rows(start: int, stop: int) -> Tensor:
        matrix = tensor.rows(row, row + 1)[0]
        return (matrix.t() if transposed else matrix)[start:stop]

    return LazyTensor(shape, tensor.dtype, rows)


def mean_of(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The element-wise mean, summed in fp64, in the dtype of the first."""
    first = tensors[0]

    def rows(start: int, stop: int) -> Tensor:
        total = first.rows(start, stop).double()
        for tensor in tensors[1:]:
            total += tensor.rows(start, stop)
        return (total / len(tensors)).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, rows)
