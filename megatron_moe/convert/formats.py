"""The formats by name: how `--from` and `--to` are read, written and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config import RunConfig
from megatron_moe.convert.hf import hf_tensors, read_hf, write_hf
from megatron_moe.convert.hf_config import to_hf
from megatron_moe.convert.hf_names import ExpertLayout
from megatron_moe.convert.lazy import LazyTensor
from megatron_moe.convert.model import Model, check_tensors
from megatron_moe.convert.native import read_native, write_native
from megatron_moe.convert.new_directory import check_new
from megatron_moe.convert.sharding import Progress
from megatron_moe.convert.t5x import read_t5x, write_t5x
from megatron_moe.convert.t5x_names import t5x_name
from megatron_moe.errors import Corrupt, UsageError

FORMATS = ("native", "hf", "t5x")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a model goes, and how.

    Args:
        format: one of `FORMATS`.
        path: the directory.
        layout: of the experts, for `hf`.
        max_shard: bytes of one file.
    """

    format: str
    path: Path
    layout: ExpertLayout = "stacked"
    max_shard: int = 5 << 30


def read(
    format_name: str, path: Path, step: int | None = None, config: RunConfig | None = None
) -> Model:
    """A model from a checkpoint, its tensors checked against its configuration but not read.

    Args:
        format_name: one of `FORMATS`.
        path: the directory.
        step: of a native checkpoint, by default the tracker's.
        config: of a t5x checkpoint, which holds none.

    Raises:
        UsageError: no such format, or the checkpoint is missing, damaged or of another model.
    """
    if format_name not in FORMATS:
        raise UsageError("--from", format_name, f"one of {', '.join(FORMATS)}")
    if format_name != "native" and step is not None:
        raise UsageError("--ckpt-step", step, f"absent: a checkpoint of {format_name} is one step")
    if format_name == "native":
        model = read_native(path, step)
    elif format_name == "hf":
        model = read_hf(path)
    elif config is None:
        raise UsageError("--preset", None, "given, or --config: t5x checkpoints say no sizes")
    else:
        model = read_t5x(path, config)
    check_tensors(model)
    return model


def planned(model: Model, target: Target) -> dict[str, LazyTensor]:
    """What would be written, by its name there.

    Raises:
        UsageError: no such format, or it cannot say what this model is.
    """
    if target.format not in FORMATS:
        raise UsageError("--to", target.format, f"one of {', '.join(FORMATS)}")
    if target.format == "native":
        return model.tensors
    check_new(target.path)
    if target.format == "t5x":
        return {f"target/{t5x_name(name)[0]}": tensor for name, tensor in model.tensors.items()}
    to_hf(model.config, model.vocab_size, "float32")
    return hf_tensors(model, target.layout)


def write(model: Model, target: Target, progress: Progress) -> Path:
    """Write a model; all of it or nothing.

    Returns:
        Where it is.
    """
    planned(model, target)
    if target.format == "native":
        return write_native(model, target.path, target.max_shard, progress)
    if target.format == "t5x":
        return write_t5x(model, target.path, progress)
    return write_hf(model, target.path, target.layout, target.max_shard, progress)


def compare(expected: Model, found: Model, progress: Callable[[int], object]) -> int:
    """Prove that two models are the same: tensors by count, shape, dtype and SHA-256.

    Returns:
        The number of tensors.

    Raises:
        Corrupt: a tensor differs; the first is named.
    """
    if expected.tensors.keys() != found.tensors.keys():
        counts = len(found.tensors), f"{len(expected.tensors)}, those of {expected.source}"
        raise Corrupt(f"tensors of {found.source}", *counts)
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        if tensor.digest() != other.digest():
            what = f"{name} in {found.source}"
            raise Corrupt(what, f"{other.dtype} with other values", f"that of {expected.source}")
        progress(tensor.bytes)
    return len(expected.tensors)
