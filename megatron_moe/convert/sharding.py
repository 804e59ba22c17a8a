"""Which tensors share a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_moe.convert.lazy import LazyTensor

Progress = Callable[[int], Any]
"""Told the bytes of each part that was written."""


def shards_of(tensors: Mapping[str, LazyTensor], most: int) -> list[list[str]]:
    """Names in their order, cut into files of at most ``most`` bytes; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    return shards
