"""Gathering shards into logical tensors and comparing two sets of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A block of a logical tensor as one rank holds it; plain data, sent between processes."""

    name: str
    logical_shape: tuple[int, ...]
    view_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor


def assemble(blocks: Iterable[Block]) -> dict[str, Tensor]:
    """Put blocks together; each element must be covered, and replicas must agree to the bit."""
    blocks = list(blocks)
    tensors: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for block in blocks:
        view = tensors.setdefault(
            block.name, torch.zeros(prod(block.view_shape), dtype=block.data.dtype)
        ).view(block.view_shape)
        seen = covered.setdefault(
            block.name, torch.zeros(prod(block.view_shape), dtype=torch.bool)
        ).view(block.view_shape)
        index = tuple(slice(o, o + s) for o, s in zip(block.offsets, block.data.shape, strict=True))
        clash = seen[index] & (view[index] != block.data)
        assert not clash.any(), f"replicas of {block.name} differ"
        view[index] = block.data
        seen[index] = True
    for name, seen in covered.items():
        assert seen.all(), f"{name} is not covered"
    shapes = {block.name: block.logical_shape for block in blocks}
    return {name: tensor.view(shapes[name]) for name, tensor in tensors.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected element."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = expected.abs().max().clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every logical tensor of ``expected`` is there and within ``tolerance``, relative."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"outside {tolerance}: {wrong}"
