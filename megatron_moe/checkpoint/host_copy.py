"""A copy of a rank's state in host memory, laid out as the files that it will become.

The only part of an asynchronous save that training waits for. The memory is kept from one save to
the next: it is the one extra copy that such a save needs, and pages that are there already are
written more than twice as fast as new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.files import Pending, arranged
from megatron_moe.errors import CheckpointError


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

    def copy(self, files: Sequence[tuple[Sequence[Pending], Mapping[str, str]]]) -> list[HostCopy]:
        """Copy tensors; when this returns, they may change.

        Args:
            files: of each, its tensors - on any device and in any memory layout, each in a single
                part - and strings for its head.

        Raises:
            CheckpointError: there is not enough memory.
        """
        arrangements = [arranged(tensors, metadata) for tensors, metadata in files]
        starts = list(accumulate((_room(tensors) for _, tensors in arrangements), initial=0))
        if starts[-1] > self._bytes.numel():
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old memory goes first
            self._bytes = self._allocate(starts[-1])
        copies, on_gpu = [], False
        for start, (head, tensors) in zip(starts, arrangements, strict=False):
            stop = self._place(tensors, start)
            raw: Any = self._bytes[start:stop].numpy()
            copies.append(HostCopy(head, memoryview(raw)))
            on_gpu = on_gpu or any(part.is_cuda for tensor in tensors for part in tensor.parts())
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _place(self, tensors: Sequence[Pending], start: int) -> int:
        """Copy the tensors of one file to where it begins; returns where it ends."""
        for tensor in tensors:
            (source,) = tensor.parts()
            stop = start + tensor.bytes
            # Wide types come first, so every start is a multiple of the width.
            target = self._bytes[start:stop].view(tensor.dtype).view(tensor.shape)
            target.copy_(source.detach(), non_blocking=True)
            start = stop
        return start

    def _allocate(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:
            found = f"a copy of {size} bytes that the host has no memory for"
            fix = "save without it, or from more ranks"
            raise CheckpointError("--async-save", found, "memory for one copy", fix) from None


def _room(tensors: Sequence[Pending]) -> int:
    """Bytes of a file's tensors, and what the next file needs to begin at a multiple of 16."""
    size = sum(tensor.bytes for tensor in tensors)
    return size + -size % 16
