"""A model between two formats: its configuration, and its tensors under our logical names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_moe.config import RunConfig
from megatron_moe.convert.lazy import LazyTensor, mean_of
from megatron_moe.errors import CheckpointError, UsageError
from megatron_moe.model.logical import logical_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of --dtype."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Weights and what they belong to.

    Args:
        source: where they come from, for messages.
        config: of the run, or as much of one as the format holds.
        vocab_size: V, rows of the embedding.
        tensors: by logical name.
        step: optimizer steps done; 0 if the format does not say.
        tokenizer_hash: identifies the tokenizer; empty if unknown.
        tokenizer_files: files that belong to it.
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


def check_tensors(model: Model) -> None:
    """Compare with what the configuration says there must be.

    Raises:
        CheckpointError: tensors are missing, too many, or of another shape; each is named.
    """
    wanted = logical_parameters(model.config.model, model.config.moe, model.vocab_size)
    faults = [f"{name} is missing" for name in wanted.keys() - model.tensors.keys()]
    faults += [f"{name} is not of this model" for name in model.tensors.keys() - wanted.keys()]
    for name in wanted.keys() & model.tensors.keys():
        found, right = list(model.tensors[name].shape), list(wanted[name].shape)
        if found != right:
            faults.append(f"{name} has shape {found}, expected {right}")
    if faults:
        expected = "the tensors of the configuration beside them"
        what = f"{len(faults)} tensors of {model.source}"
        raise CheckpointError(what, "different", expected, "", sorted(faults))


def cast(model: Model, dtype: str | None) -> Model:
    """All tensors in another dtype; ``None`` leaves each as it is.

    Raises:
        UsageError: there is no such dtype.
    """
    if dtype is None:
        return model
    if dtype not in DTYPES:
        raise UsageError("--dtype", dtype, f"one of {', '.join(DTYPES)}")
    return replace(model, tensors={n: t.cast(DTYPES[dtype]) for n, t in model.tensors.items()})


def average(models: Iterable[Model]) -> Model:
    """The mean of several checkpoints of the same model.

    Raises:
        CheckpointError: they are not of the same model.
    """
    first, *others = models
    for other in others:
        same = (first.config.model, first.config.moe, first.vocab_size)
        if (other.config.model, other.config.moe, other.vocab_size) != same:
            raise CheckpointError(other.source, "another model", f"the model of {first.source}")
    if not others:
        return first
    tensors = {
        name: mean_of([tensor, *(other.tensors[name] for other in others)])
        for name, tensor in first.tensors.items()
    }
    return replace(first, tensors=tensors, step=max(m.step for m in (first, *others)))
