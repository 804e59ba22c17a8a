"""The index of a checkpoint: which file holds which block of which logical tensor.

A tensor is named by its *kind* - `model`, or a kind of optimizer state such as `exp_avg` - and its
logical name. `index.json` is {kind: {name: {shape, dtype, view, blocks}}}; a block is [file,
offsets, sizes] in the tensor's view. Kind, name and offsets determine the block's key in its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from megatron_moe.checkpoint.tensor_files import DTYPES
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.sharding.blocks import Block, Shape

INDEX = "index.json"
"""The file's name."""
Name = tuple[str, str]
"""Kind and logical name."""


@dataclass(frozen=True)
class LogicalTensor:
    """A logical tensor of a checkpoint, or the blocks of it that one rank wrote."""

    kind: str
    name: str
    shape: Shape
    dtype: str
    """safetensors' name of the dtype."""
    view: Shape
    """The shape in which its blocks are rectangles."""
    blocks: tuple[tuple[str, Block], ...]
    """Files, and the block in each."""


def block_key(kind: str, name: str, offsets: Iterable[int]) -> str:
    """The key of a block in its file."""
    return f"{kind}/{name}@{'.'.join(map(str, offsets))}"


def merge(parts: Iterable[LogicalTensor]) -> dict[Name, LogicalTensor]:
    """Join the ranks' blocks of each tensor, and prove that they are the whole tensor.

    Raises:
        CheckpointError: an element was written twice or not at all, or ranks have different shapes,
            dtypes or views for a tensor. Either is a bug, found before the save is committed.
    """
    found: dict[Name, LogicalTensor] = {}
    for part in parts:
        known = found.get((part.kind, part.name))
        if known is None:
            found[part.kind, part.name] = part
            continue
        first, other = (
            (known.shape, known.dtype, known.view),
            (part.shape, part.dtype, part.view),
        )
        if first != other:
            what = f"shape, dtype and view of {part.name} ({part.kind})"
            raise CheckpointError(what, other, f"{first} on every rank")
        found[part.kind, part.name] = replace(known, blocks=known.blocks + part.blocks)
    faults = [fault for tensor in found.values() if (fault := tiling_fault(tensor))]
    if faults:
        what, expected = "every element of every tensor", "written by exactly one rank"
        raise CheckpointError(what, f"{len(faults)} faulty tensors", expected, "", faults)
    return found


def tiling_fault(tensor: LogicalTensor) -> str | None:
    """Why a tensor's blocks do not hold each element exactly once; None if they do."""
    what = f"{tensor.kind} of {tensor.name}"
    if prod(tensor.view) != prod(tensor.shape):
        return f"{what}: view {tensor.view} does not have the elements of shape {tensor.shape}"
    # With as many elements as the tensor, blocks without overlap leave no hole.
    covered = sum(block.numel for _, block in tensor.blocks)
    if covered != prod(tensor.shape):
        return f"{what}: blocks hold {covered} elements, expected {prod(tensor.shape)}"
    starts = np.array([block.offsets for _, block in tensor.blocks], dtype=np.int64)
    stops = starts + np.array([block.sizes for _, block in tensor.blocks], dtype=np.int64)
    for i in range(1, len(starts)):
        meet = (np.maximum(starts[:i], starts[i]) < np.minimum(stops[:i], stops[i])).all(axis=1)
        if meet.any():
            return f"{what}: two blocks overlap"
    return None


def to_json(tensors: Iterable[LogicalTensor]) -> dict[str, Any]:
    """The content of `index.json`."""
    content: dict[str, Any] = {}
    for tensor in tensors:
        blocks = [[file, list(b.offsets), list(b.sizes)] for file, b in tensor.blocks]
        content.setdefault(tensor.kind, {})[tensor.name] = {
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "view": list(tensor.view),
            "blocks": blocks,
        }
    return content


def from_json(
    content: dict[str, Any], source: str, partial: bool = False
) -> Iterator[LogicalTensor]:
    """The inverse of `to_json`; every value is checked, since the file may have been changed.

    Args:
        content: of ``source``.
        source: a file's name, for errors.
        partial: whether it is the index of one rank's files, not yet merged.

    Raises:
        Corrupt: the content is not an index.
    """
    for kind, tensors in content.items():
        if not isinstance(tensors, dict):
            found = type(tensors).__name__
            raise Corrupt(f"{kind} in {source}", found, "an object of tensors")
        for name, entry in tensors.items():
            try:
                view = _shape(entry["view"])
                blocks = tuple(_block(item, view) for item in entry["blocks"])
                dtype = {d: d for d in DTYPES.values()}[entry["dtype"]]
                shape = _shape(entry["shape"])
            except (KeyError, TypeError, ValueError) as error:
                what, expected = f"{kind} of {name} in {source}", "an entry of an index"
                raise Corrupt(what, repr(error), expected) from None
            tensor = LogicalTensor(kind, name, shape, dtype, view, blocks)
            fault = None if partial else tiling_fault(tensor)
            if fault:
                raise Corrupt(f"every element in {source}", fault, "in exactly one block")
            yield tensor


def _shape(values: Any) -> Shape:
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise ValueError("not a list of sizes")
    return tuple(values)


def _block(item: Any, view: Shape) -> tuple[str, Block]:
    file, offsets, sizes = item
    block = Block(view, _shape(offsets), _shape(sizes))
    if not isinstance(file, str) or len(block.offsets) != len(view) or len(sizes) != len(view):
        raise ValueError("not a block")
    if any(o + s > n for o, s, n in zip(block.offsets, block.sizes, view, strict=True)):
        raise ValueError("a block exceeds its tensor")
    return file, block
