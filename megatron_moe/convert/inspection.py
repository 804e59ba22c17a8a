"""Inspect and compare checkpoints: what one contains, how two differ, whether a copy is exact.

Memory is bounded by one part of one tensor, except for the comparison of logits, which loads the
single-device model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_moe.checkpoint.directory import ANOTHER_STEP, revisions, step_directory
from megatron_moe.checkpoint.metadata import CheckpointMetadata, open_checkpoint
from megatron_moe.checkpoint.tensor_files import TORCH_DTYPES
from megatron_moe.convert.model import LazyTensor, LogicalModel
from megatron_moe.convert.native import read_native
from megatron_moe.errors import Corrupt, with_fixes
from megatron_moe.model.reference import ReferenceOpenMoE

_ELEMENTS = 16 << 20
"""Elements compared at a time. Counted in elements, so two dtypes are cut into the same parts."""
PROMPT = (7, 3, 11, 3, 19, 2, 5, 13)
"""Token ids, modulo the vocabulary size, on which logits are compared."""
_SPARE = 1.2
"""Factor on the bytes of the weights for activations and one tensor held twice."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class TensorFacts:
    """Statistics of one tensor, computed in fp64.

    Args:
        name: logical name.
        shape: logical shape.
        dtype: torch's name of the dtype.
        mean: mean of the elements.
        std: standard deviation of the elements.
        largest: largest absolute value.
        finite: whether all elements are finite.
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
    with with_fixes(ANOTHER_STEP):
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
        "experts": list(moe.moe_layer_num_experts or ()) or moe.num_experts,
        "moe_layer_freq": moe.moe_layer_freq,
        "padded_vocab_size": opened.identity.padded_vocab_size,
        "tokenizer_hash": opened.identity.tokenizer_hash,
        "data_fingerprint": opened.identity.data_fingerprint,
        "random_states": opened.random,
        "kinds": _kinds(opened),
        "files": {name: record.bytes for name, record in sorted(opened.files.items())},
    }


def _kinds(opened: CheckpointMetadata) -> dict[str, dict[str, int]]:
    """Number of tensors, elements and bytes by kind (model, optimizer state)."""
    found: dict[str, dict[str, int]] = {}
    for tensor in opened.tensors.values():
        kind = found.setdefault(tensor.kind, {"tensors": 0, "elements": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["elements"] += prod(tensor.shape)
        kind["bytes"] += prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize
    return found


def tensor_facts(directory: Path, step: int | None, pattern: str) -> Iterator[TensorFacts]:
    """Statistics of the model tensors that match a shell pattern, in the model's order.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    with with_fixes(ANOTHER_STEP):
        tensors = read_native(directory, step).tensors
    yield from facts_of(tensors, pattern)


def facts_of(tensors: Mapping[str, LazyTensor], pattern: str) -> Iterator[TensorFacts]:
    """Statistics of those tensors whose names match a shell pattern."""
    for name, tensor in tensors.items():
        if fnmatch(name, pattern):
            yield _facts(name, tensor)


def _facts(name: str, tensor: LazyTensor) -> TensorFacts:
    count, mean, spread, largest, finite = 0, 0.0, 0.0, 0.0, True
    for part in tensor.parts():
        values = part.double().flatten()
        finite = finite and bool(values.isfinite().all())
        # Means and squared deviations of the parts are merged (Chan et al., 1979). E[x^2] - E[x]^2
        # in one pass would cancel where the mean is large compared to the deviation.
        size, part_mean = values.numel(), float(values.mean())
        total = count + size
        within = float((values - part_mean).square().sum())
        spread += within + (part_mean - mean) ** 2 * count * size / total
        mean += (part_mean - mean) * size / total
        count, largest = total, max(largest, float(values.abs().max()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorFacts(name, tensor.shape, dtype, mean, math.sqrt(spread / count), largest, finite)


def differences(first: Path, second: Path, steps: tuple[int | None, int | None]) -> Iterator[str]:
    """A line for every setting and every tensor in which two checkpoints differ.

    Raises:
        UsageError: one of them is missing or damaged.
    """
    with with_fixes(ANOTHER_STEP):
        a = read_native(first, steps[0])
    with with_fixes({Corrupt: "another step, with --compare-step, may be intact"}):
        b = read_native(second, steps[1])
    # `asdict` has every setting; `to_dict` omits some at their defaults, which differ as well.
    yield from setting_differences(_flat(asdict(a.config)), _flat(asdict(b.config)))
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
        # NaN against a number counts as an infinite difference, NaN against NaN as none.
        apart = apart.nan_to_num(nan=math.inf).masked_fill(a.isnan() & b.isnan(), 0.0)
        changed += int((apart > 0).sum())
        largest = max(largest, float(apart.max()))
    kinds = f", {first.dtype} and {second.dtype}" if first.dtype != second.dtype else ""
    if not changed and not kinds:
        return ""
    return f"{changed} of {count} elements differ, by up to {largest:.3g}{kinds}"


def check_same_tensors(
    expected: LogicalModel, found: LogicalModel, progress: Callable[[int], object]
) -> int:
    """Check that two models have the same tensors: number, shape, dtype and SHA-256.

    Returns:
        The number of tensors.

    Raises:
        Corrupt: a tensor differs; the first is named.
    """
    if expected.tensors.keys() != found.tensors.keys():
        right = f"{len(expected.tensors)}, those of {expected.source}"
        raise Corrupt(f"tensors of {found.source}", len(found.tensors), right)
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        if tensor.digest() != other.digest():
            what = f"values of {name} in {found.source}"
            raise Corrupt(what, f"other {other.dtype} values", f"those of {expected.source}")
        progress(tensor.bytes)
    return len(expected.tensors)


def memory_needed(model: LogicalModel) -> int:
    """Bytes that the single-device model needs in fp32."""
    return int(_SPARE * sum(4 * prod(tensor.shape) for tensor in model.tensors.values()))


def free_memory() -> int:
    """Bytes available to this process, within the memory limit of its container."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def logits_difference(first: LogicalModel, second: LogicalModel) -> float:
    """Largest absolute difference of logits on `PROMPT`, by the single-device model in fp32."""
    found = []
    for model in (first, second):
        moe, size = model.config.moe, model.vocab_size
        reference = ReferenceOpenMoE(model.config.model, moe, size, seed=None)
        reference.load_logical((n, t.whole().float()) for n, t in model.tensors.items())
        tokens = torch.tensor([[token % size for token in PROMPT]])
        with torch.no_grad():
            found.append(reference.eval()(tokens, training_capacity=False).logits)
    return float((found[0] - found[1]).abs().max())
