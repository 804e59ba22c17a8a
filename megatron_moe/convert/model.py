"""A model between two formats: its configuration, and tensors that are read when needed.

Every format is read into a `LogicalModel`, whose tensors have the logical names of
`megatron_moe.model.logical`, and written from one. A `LazyTensor` holds no data: it reads ranges of
rows from its file, so a conversion streams models larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.tensor_files import TensorSource, bytes_of
from megatron_moe.config import RunConfig
from megatron_moe.errors import CheckpointError, UsageError
from megatron_moe.model.logical import logical_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of --dtype."""
PART_BYTES = 512 << 20
"""Approximate bytes of a tensor in memory at a time."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read from its source in ranges of rows.

    Args:
        shape: shape of the whole tensor.
        dtype: dtype of its elements.
        rows: reads rows [start, stop) of the first dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """The whole tensor."""
        return self.rows(0, self.shape[0])

    def parts(self, step: int | None = None) -> Iterator[Tensor]:
        """The rows in order, ``step`` at a time, by default about `PART_BYTES`."""
        if step is None:
            step = max(1, PART_BYTES // max(1, self.bytes // max(1, self.shape[0])))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))

    def pending(self, key: str, progress: Callable[[int], Any] | None = None) -> TensorSource:
        """The tensor to be written under ``key``; ``progress`` gets the bytes of each part."""

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
            found.update(bytes_of(part))
        return found.hexdigest()


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is already in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


def stacked(each: Sequence[LazyTensor], transposed: bool) -> LazyTensor:
    """Matrices of one shape as a tensor [len(each), ...], each transposed if ``transposed``."""
    shape = each[0].shape[::-1] if transposed else each[0].shape

    def rows(start: int, stop: int) -> Tensor:
        matrices = (tensor.whole() for tensor in each[start:stop])
        return torch.stack([m.t() if transposed else m for m in matrices])

    return LazyTensor((len(each), *shape), each[0].dtype, rows)


def row_of(tensor: LazyTensor, row: int, transposed: bool) -> LazyTensor:
    """One matrix of a stack [N, ...], transposed if ``transposed``."""
    shape = tensor.shape[:0:-1] if transposed else tensor.shape[1:]

    def rows(start: int, stop: int) -> Tensor:
        matrix = tensor.rows(row, row + 1)[0]
        return (matrix.t() if transposed else matrix)[start:stop]

    return LazyTensor(shape, tensor.dtype, rows)


@dataclass(frozen=True, kw_only=True)
class LogicalModel:
    """Weights under logical names, with their configuration and tokenizer.

    Args:
        source: the checkpoint they are read from, for messages.
        config: configuration of the run, as far as the format records it.
        vocab_size: V, rows of the embedding.
        tensors: by logical name.
        step: optimizer steps taken; 0 if the format does not record it.
        tokenizer_hash: hash of the tokenizer; empty if unknown.
        tokenizer_files: files of the tokenizer.
    """

    source: str
    config: RunConfig
    vocab_size: int
    tensors: dict[str, LazyTensor]
    step: int = 0
    tokenizer_hash: str = ""
    tokenizer_files: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def check_tensors(model: LogicalModel, fix: str = "") -> None:
    """Compare names and shapes with those that the configuration implies.

    Args:
        model: what was read.
        fix: for the error, where the configuration is not part of the checkpoint.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; each is listed.
    """
    expected = logical_parameters(model.config.model, model.config.moe, model.vocab_size)
    faults = [f"{name} is missing" for name in expected.keys() - model.tensors.keys()]
    faults += [f"{name} is unexpected" for name in model.tensors.keys() - expected.keys()]
    for name in expected.keys() & model.tensors.keys():
        found, right = list(model.tensors[name].shape), list(expected[name].shape)
        if found != right:
            faults.append(f"{name} must have shape {right} (got {found})")
    if faults:
        what = f"tensors of {model.source}"
        found_text = f"{len(faults)} different"
        raise CheckpointError(what, found_text, "those of its configuration", fix, sorted(faults))


def cast(model: LogicalModel, dtype: str | None) -> LogicalModel:
    """All tensors cast to another dtype; ``None`` leaves each unchanged.

    Raises:
        UsageError: the dtype is not one of `DTYPES`.
    """
    if dtype is None:
        return model
    if dtype not in DTYPES:
        raise UsageError("--dtype", dtype, f"one of {', '.join(DTYPES)}")
    return replace(model, tensors={n: t.cast(DTYPES[dtype]) for n, t in model.tensors.items()})


def average(models: Iterable[LogicalModel]) -> LogicalModel:
    """The mean of several checkpoints of the same model.

    Raises:
        CheckpointError: they are not of the same model.
    """
    first, *others = models
    for other in others:
        same = (first.config.model, first.config.moe, first.vocab_size)
        if (other.config.model, other.config.moe, other.vocab_size) != same:
            what = f"model of {other.source}"
            raise CheckpointError(what, "another model", f"that of {first.source}")
    if not others:
        return first
    tensors = {
        name: mean_of([tensor, *(other.tensors[name] for other in others)])
        for name, tensor in first.tensors.items()
    }
    known = next((m for m in (first, *others) if m.tokenizer_hash), first)
    for other in others:
        if other.tokenizer_hash not in ("", known.tokenizer_hash):
            what, expected = f"tokenizer of {other.source}", f"that of {known.source}"
            raise CheckpointError(what, other.tokenizer_hash[:12], expected)
    return replace(
        first,
        tensors=tensors,
        step=max(m.step for m in (first, *others)),
        tokenizer_hash=known.tokenizer_hash,
        tokenizer_files=known.tokenizer_files,
    )


def mean_of(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The element-wise mean, summed in fp64, in the dtype of the first tensor."""
    first = tensors[0]

    def rows(start: int, stop: int) -> Tensor:
        total = first.rows(start, stop).double()
        for tensor in tensors[1:]:
            total += tensor.rows(start, stop)
        return (total / len(tensors)).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, rows)
