"""A copy of a rank's state in host memory, laid out as the file that it will become.

The only part of an asynchronous save that training waits for. The memory is kept from one save to
the next: it is the one extra copy that such a save needs, and pages that are there already are
written more than twice as fast as new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.errors import CheckpointError
from megatron_moe.checkpoint.files import Pending, arranged


@dataclass(frozen=True)
class HostCopy:
    """A safetensors file that is not on the disk yet; valid until the next one is taken."""

    head: bytes
    data: memoryview
    """The tensors' bytes."""

    def parts(self) -> Iterator[memoryview]:
        """All of the file."""
        yield memoryview(self.head)
        yield self.data


class HostMemory:
    """Memory for one copy at a time, as large as the largest so far.

    Args:
        pinned: page-locked, so that a GPU copies into it at full speed.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[Pending], metadata: Mapping[str, str]) -> HostCopy:
        """Copy tensors; when this returns, they may change.

        Args:
            tensors: on any device and in any memory layout, each in a single part.
            metadata: strings for the head of the file.

        Raises:
            CheckpointError: there is not enough memory.
        """
        head, ordered = arranged(tensors, metadata)
        total = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in ordered)
        if total > self._bytes.numel():
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old memory goes first
            self._bytes = self._allocate(total)
        start, on_gpu = 0, False
        for tensor in ordered:
            (source,) = tensor.parts()
            stop = start + prod(tensor.shape) * tensor.dtype.itemsize
            # Wide types come first, so every start is a multiple of the width.
            target = self._bytes[start:stop].view(tensor.dtype).view(tensor.shape)
            target.copy_(source.detach(), non_blocking=True)
            start, on_gpu = stop, on_gpu or source.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        raw: Any = self._bytes[:total].numpy()
        return HostCopy(head, memoryview(raw))

    def _allocate(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:
            found = f"a copy of {size} bytes that the host has no memory for"
            fix = "save without it, or from more ranks"
            raise CheckpointError("--async-save", found, "memory for one copy", fix) from None
