"""What is in a native checkpoint, and how two of them differ. One part of one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.directory import revisions, step_directory
from megatron_moe.checkpoint.metadata import CheckpointMetadata, open_checkpoint
from megatron_moe.checkpoint.tensor_files import TORCH_DTYPES
from megatron_moe.convert.lazy import LazyTensor
from megatron_moe.convert.native import read_native

_ELEMENTS = 16 << 20
"""Of two tensors compared at a time; counted so, they are cut alike whatever their dtypes."""


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of the model.

    Args:
        name: logical.
        shape: logical.
        dtype: torch's name.
        mean: of its elements, in fp64 like the others.
        std: their standard deviation.
        largest: their largest absolute value.
        finite: whether all of them are finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float
    std: float
    largest: float
    finite: bool


def overview(directory: Path, step: int | None = None) -> dict[str, Any]:
    """Step, progress, sizes by kind, files and vocabulary, as JSON values. Reads no tensor.

    Raises:
        UsageError: there is no such checkpoint, or its JSON files are damaged.
    """
    number, path = step_directory(directory, step)
    opened = open_checkpoint(path)
    model, moe = opened.config.model, opened.config.moe
    return {
        "path": str(path),
        "step": number,
        "steps": sorted(revisions(Path(directory))),
        "samples": opened.train.consumed_train_samples,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_variant": model.ffn_variant,
        "experts": moe.num_experts,
        "moe_layer_freq": moe.moe_layer_freq,
        "padded_vocab_size": opened.identity.padded_vocab_size,
        "tokenizer_hash": opened.identity.tokenizer_hash,
        "data_fingerprint": opened.identity.data_fingerprint,
        "random_states": opened.random,
        "kinds": _kinds(opened),
        "files": {name: record.bytes for name, record in sorted(opened.files.items())},
    }


def _kinds(opened: CheckpointMetadata) -> dict[str, dict[str, int]]:
    """By kind: tensors, elements and bytes."""
    found: dict[str, dict[str, int]] = {}
    for tensor in opened.tensors.values():
        kind = found.setdefault(tensor.kind, {"tensors": 0, "elements": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["elements"] += prod(tensor.shape)
        kind["bytes"] += prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize
    return found


def tensor_facts(directory: Path, step: int | None, pattern: str) -> Iterator[TensorFacts]:
    """Facts of the model's tensors whose names match a shell pattern, in the model's order.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    yield from facts_of(read_native(directory, step).tensors, pattern)


def facts_of(tensors: Mapping[str, LazyTensor], pattern: str) -> Iterator[TensorFacts]:
    """Facts of those tensors whose names match a shell pattern."""
    for name, tensor in tensors.items():
        if fnmatch(name, pattern):
            yield _facts(name, tensor)


def _facts(name: str, tensor: LazyTensor) -> TensorFacts:
    count, mean, spread, largest, finite = 0, 0.0, 0.0, 0.0, True
    for part in tensor.parts():
        values = part.double().flatten()
        finite = finite and bool(values.isfinite().all())
        # Means and squared deviations of parts, joined without cancellation (Chan et al., 1979).
        size, its = values.numel(), float(values.mean())
        total = count + size
        spread += float((values - its).square().sum()) + (its - mean) ** 2 * count * size / total
        mean += (its - mean) * size / total
        count, largest = total, max(largest, float(values.abs().max()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorFacts(name, tensor.shape, dtype, mean, math.sqrt(spread / count), largest, finite)


def differences(first: Path, second: Path, steps: tuple[int | None, int | None]) -> Iterator[str]:
    """A line for every setting and every tensor in which two checkpoints differ.

    Raises:
        UsageError: one of them is missing or damaged.
    """
    a, b = read_native(first, steps[0]), read_native(second, steps[1])
    yield from setting_differences(_flat(a.config.to_dict()), _flat(b.config.to_dict()))
    yield from tensor_differences(a.tensors, b.tensors)


def setting_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """A line for every setting in which two configurations differ."""
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield f"{key}: {first.get(key)!r} and {second.get(key)!r}"


def tensor_differences(
    first: Mapping[str, LazyTensor], second: Mapping[str, LazyTensor]
) -> Iterator[str]:
    """A line for every tensor that only one side has, or whose values differ."""
    for name in sorted(first.keys() ^ second.keys()):
        yield f"{name}: only in the {'first' if name in first else 'second'}"
    for name in first:
        if name in second:
            line = _tensor_difference(first[name], second[name])
            if line:
                yield f"{name}: {line}"


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{s}.{key}": value for s, values in config.items() for key, value in values.items()}


def _tensor_difference(first: LazyTensor, second: LazyTensor) -> str:
    if first.shape != second.shape:
        return f"shape {list(first.shape)} and {list(second.shape)}"
    largest, changed, count = 0.0, 0, prod(first.shape)
    step = max(1, _ELEMENTS // max(1, prod(first.shape[1:])))
    for a, b in zip(first.parts(step), second.parts(step), strict=True):
        apart = (a.double() - b.double()).abs()
        # Two values that are not numbers are as different as can be, unless both are.
        apart = apart.nan_to_num(nan=math.inf).masked_fill(a.isnan() & b.isnan(), 0.0)
        changed += int((apart > 0).sum())
        largest = max(largest, float(apart.max()))
    kinds = f", {first.dtype} and {second.dtype}" if first.dtype != second.dtype else ""
    if not changed and not kinds:
        return ""
    return f"{changed} of {count} elements differ, by up to {largest:.3g}{kinds}"
