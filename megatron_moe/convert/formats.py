"""The formats by name: how `--from` is read and `--to` is written.

A conversion is `read` -> (`average`, `upcycle`, `cast`) -> `write`. The module of each format reads
and writes it: `native.py`, `hf.py` (and `llama.py`), `t5x.py`; `megatron.py` only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_moe.checkpoint.directory import ANOTHER_STEP
from megatron_moe.config import RunConfig
from megatron_moe.convert.hf import ExpertLayout, hf_tensors, read_hf, write_hf
from megatron_moe.convert.hf_config import to_hf
from megatron_moe.convert.llama import architecture_of, read_architecture, to_architecture
from megatron_moe.convert.megatron import read_megatron
from megatron_moe.convert.model import LazyTensor, LogicalModel, check_tensors
from megatron_moe.convert.native import read_native, write_native
from megatron_moe.convert.t5x import check_expressible, read_t5x, t5x_name, write_t5x
from megatron_moe.convert.writing import Progress, check_new
from megatron_moe.errors import UsageError, with_fixes

OPENMOE = "OpenMoeForCausalLM"
FORMATS = ("native", "hf", "t5x")
"""Values of --to."""
SOURCES = (*FORMATS, "megatron")
"""Values of --from."""
_WITH_STEPS = ("native", "megatron")


@dataclass(frozen=True, kw_only=True)
class ConversionTarget:
    """What a conversion writes.

    Args:
        format: one of `FORMATS`.
        path: directory to write.
        layout: layout of the experts, for OpenMoE in `hf`; other architectures have one.
        architecture: class of `transformers` that loads the result, for `hf`: a key in
            `llama.ARCHITECTURES`, or `OPENMOE`.
        max_shard: maximal bytes of a file.
    """

    format: str
    path: Path
    layout: ExpertLayout = "stacked"
    architecture: str = OPENMOE
    max_shard: int = 5 << 30


def read(
    format_name: str, path: Path, step: int | None = None, config: RunConfig | None = None
) -> LogicalModel:
    """Open a checkpoint; names and shapes are checked, tensors are not read yet.

    Args:
        format_name: one of `SOURCES`.
        path: directory of the checkpoint.
        step: step of a native or Megatron-LM checkpoint, by default the tracker's.
        config: configuration of a t5x checkpoint, which contains none; of a Megatron-LM checkpoint
            in place of its own.

    Raises:
        UsageError: the format is unknown, or the checkpoint is missing, damaged or another
            model's.
    """
    if format_name not in SOURCES:
        raise UsageError("--from", format_name, f"one of {', '.join(SOURCES)}")
    if format_name not in _WITH_STEPS and step is not None:
        expected = f"absent with --from {format_name}, whose checkpoints hold a single step"
        raise UsageError("--ckpt-step", step, expected)
    if format_name == "native":
        with with_fixes(ANOTHER_STEP):
            model = read_native(path, step)
    elif format_name == "hf":
        architecture = architecture_of(path)
        model = read_hf(path) if architecture is None else read_architecture(path, architecture)
    elif format_name == "megatron":
        model = read_megatron(path, step, config)
    elif config is None:
        reason = "t5x checkpoints do not record the model's sizes"
        raise UsageError("--preset", None, "given, or --config", reason)
    else:
        model = read_t5x(path, config)
    given = "give the --preset or --config of this checkpoint" if config is not None else ""
    check_tensors(model, given)
    return model


def planned_tensors(model: LogicalModel, target: ConversionTarget) -> dict[str, LazyTensor]:
    """The tensors that would be written, by their name in the target format.

    Raises:
        UsageError: the format is unknown or cannot represent this model, or the target exists.
    """
    if target.format != "hf" and target.architecture != OPENMOE:
        expected = f"absent with --to {target.format}"
        raise UsageError("--architecture", target.architecture, expected)
    if target.format not in FORMATS:
        raise UsageError("--to", target.format, f"one of {', '.join(FORMATS)}")
    if target.format == "native":
        return model.tensors
    check_new(target.path)
    if target.format == "t5x":
        check_expressible(model.config)
        return {f"target/{t5x_name(name)[0]}": tensor for name, tensor in model.tensors.items()}
    if target.architecture == OPENMOE:
        to_hf(model.config, model.vocab_size, "float32")
        return hf_tensors(model, target.layout)
    to_architecture(target.architecture, model.config, model.vocab_size, "float32")
    return hf_tensors(model, "unstacked")


def write(model: LogicalModel, target: ConversionTarget, progress: Progress) -> Path:
    """Write a model, complete or not at all.

    Returns:
        The directory that was written.
    """
    planned_tensors(model, target)  # raises before anything is written
    if target.format == "native":
        return write_native(model, target.path, target.max_shard, progress)
    if target.format == "t5x":
        return write_t5x(model, target.path, progress)
    if target.architecture == OPENMOE:
        return write_hf(model, target.path, target.layout, target.max_shard, progress)
    describe = partial(to_architecture, target.architecture)
    return write_hf(model, target.path, "unstacked", target.max_shard, progress, describe)
