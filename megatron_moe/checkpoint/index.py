"""The index of a checkpoint: which file holds which block of which logical tensor.

A tensor is named by its *kind* - `model`, or a part of the optimizer's state such as `exp_avg` -
and its logical name. `index.json` is {kind: {name: {shape, dtype, view, blocks}}}, a block being
[file, offsets, sizes] in the tensor's view. The key of a block in its file follows from kind, name
and offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.files import DTYPES, TORCH_DTYPES
from megatron_moe.checkpoint.mapped import TensorFiles
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.sharding.blocks import Block, Shape, copy_overlap

INDEX = "index.json"
"""The file that says where every tensor is."""
Name = tuple[str, str]
"""Kind and logical name."""


@dataclass(frozen=True)
class LogicalTensor:
    """A whole tensor of a checkpoint."""

    kind: str
    name: str
    shape: Shape
    dtype: str
    """safetensors' name of the dtype."""
    view: Shape
    """The shape it is cut in."""
    blocks: tuple[tuple[str, Block], ...]
    """Files and what each holds."""


def block_key(kind: str, name: str, offsets: Iterable[int]) -> str:
    """The key of a block in its file."""
    return f"{kind}/{name}@{'.'.join(map(str, offsets))}"


def merge(parts: Iterable[LogicalTensor]) -> dict[Name, LogicalTensor]:
    """Join what ranks wrote of each tensor, and prove that it is all of it, once.

    Raises:
        CheckpointError: some of a tensor was written twice, or by nobody, or ranks disagree about
            it. This would be a fault of the program, found before it can hurt.
    """
    found: dict[Name, LogicalTensor] = {}
    for part in parts:
        known = found.get((part.kind, part.name))
        if known is None:
            found[part.kind, part.name] = part
            continue
        mine, theirs = (
            (known.shape, known.dtype, known.view),
            (part.shape, part.dtype, part.view),
        )
        if mine != theirs:
            raise CheckpointError(f"{part.kind} of {part.name}", theirs, f"{mine} on every rank")
        blocks = known.blocks + part.blocks
        found[part.kind, part.name] = LogicalTensor(
            part.kind, part.name, *mine[:2], mine[2], blocks
        )
    faults = [fault for tensor in found.values() if (fault := tiling_fault(tensor))]
    if faults:
        expected = "each element written by exactly one rank"
        raise CheckpointError("checkpoint", f"{len(faults)} faulty tensors", expected, "", faults)
    return found


def tiling_fault(tensor: LogicalTensor) -> str | None:
    """Why blocks are not the whole tensor, each element once; None if they are."""
    what = f"{tensor.kind} of {tensor.name}"
    if prod(tensor.view) != prod(tensor.shape):
        return f"{what}: view {tensor.view} is not of shape {tensor.shape}"
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
    """The contents of `index.json`."""
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
    """The inverse of `to_json`, trusting nothing.

    Args:
        content: of ``source``.
        source: a file's name, for errors.
        partial: it is one rank's share, not yet merged.

    Raises:
        Corrupt: the content is not an index.
    """
    for kind, named in content.items():
        if not isinstance(named, dict):
            raise Corrupt(source, kind, "an object of tensors")
        for name, entry in named.items():
            try:
                view = _shape(entry["view"])
                blocks = tuple(_block(item, view) for item in entry["blocks"])
                dtype = {d: d for d in DTYPES.values()}[entry["dtype"]]
                shape = _shape(entry["shape"])
            except (KeyError, TypeError, ValueError) as error:
                raise Corrupt(f"{kind} of {name} in {source}", repr(error), "its index") from None
            tensor = LogicalTensor(kind, name, shape, dtype, view, blocks)
            fault = None if partial else tiling_fault(tensor)
            if fault:
                raise Corrupt(source, fault, "each element in exactly one file")
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
        raise ValueError("a block leaves its tensor")
    return file, block


class TensorReader:
    """Reads any block of any logical tensor, touching only the files that hold some of it."""

    def __init__(self, directory: Path, tensors: dict[Name, LogicalTensor]) -> None:
        self.tensors = tensors
        self._files = TensorFiles(directory)

    def fill(self, kind: str, name: str, block: Block, out: Tensor) -> None:
        """Read one block into a tensor shaped ``block.sizes`` of the same dtype.

        Raises:
            CheckpointError: the tensor is cut in an incompatible way.
            Corrupt: a file does not hold what the index says.
        """
        tensor = self.tensors[kind, name]
        copied = 0
        for file, stored in tensor.blocks:
            if stored.view == block.view and stored.intersection(block) is None:
                continue
            key = block_key(kind, name, stored.offsets)
            values = self._files.tensor(file, key, tensor.dtype, stored.sizes)
            try:
                copied += copy_overlap(stored, values, block, out)
            except ValueError as error:
                raise CheckpointError(name, str(error), "compatible shapes") from None
        if copied != block.numel:
            raise Corrupt(f"{kind} of {name}", f"{copied} elements", f"{block.numel}")

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole logical tensor, on the CPU."""
        tensor = self.tensors[kind, name]
        out = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
        self.fill(kind, name, Block.whole(tensor.view), out.view(tensor.view))
        return out
