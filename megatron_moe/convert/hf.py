"""Hugging Face checkpoints of OpenMoE: `config.json`, safetensors with an index, tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.disk import read_json, write_json
from megatron_moe.checkpoint.tensor_files import FORMAT_METADATA, write_tensors
from megatron_moe.convert.hf_config import from_hf, to_hf
from megatron_moe.convert.hf_files import open_files
from megatron_moe.convert.hf_names import EXPERT, ExpertLayout, expert_name, hf_name, layout_of
from megatron_moe.convert.lazy import LazyTensor, row_of, stacked
from megatron_moe.convert.llama import ARCHITECTURE, read_llama
from megatron_moe.convert.model import Model
from megatron_moe.convert.new_directory import new_directory
from megatron_moe.convert.sharding import Progress, shards_of
from megatron_moe.errors import Corrupt
from megatron_moe.model.logical import logical_parameters

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.model", "spiece.model", "tokenizer.json", "tokenizer_config.json")
"""Files that travel with a tokenizer."""


def read_hf(directory: Path) -> Model:
    """A checkpoint directory: OpenMoE in either layout of the experts, or a dense Llama.

    Raises:
        UsageError: a file is missing or damaged, or it is another kind of model.
    """
    source = directory / CONFIG
    values = read_json(source)
    files = tuple(directory / name for name in TOKENIZERS if (directory / name).is_file())
    if values.get("architectures") == [ARCHITECTURE]:
        return replace(read_llama(directory, values), tokenizer_files=files)
    config, vocab_size = from_hf(values, str(source))
    found = open_files(directory)
    layout = layout_of(set(found))
    tensors: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name, parameter in logical_parameters(config.model, config.moe, vocab_size).items():
        names = _names(name, layout, config.moe.num_experts)
        missing = [each for each in names if each not in found]
        if missing:
            raise Corrupt(str(directory), f"without {missing[0]}", f"{len(names)} of {name}")
        used.update(names)
        each = [found[n] for n in names]
        is_stack = layout == "unstacked" and EXPERT.fullmatch(name)
        tensors[name] = stacked(each, transposed=True) if is_stack else each[0]
        if tensors[name].shape != parameter.shape:
            shapes = f"shape {list(tensors[name].shape)}", f"{list(parameter.shape)}"
            raise Corrupt(f"{names[0]} in {directory}", *shapes)
    extra = sorted(set(found) - used)
    if extra:
        raise Corrupt(str(directory), f"with {', '.join(extra[:5])}", "no tensor but the model's")
    return Model(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        tokenizer_files=files,
    )


def _names(name: str, layout: ExpertLayout, experts: int) -> list[str]:
    if layout == "unstacked" and EXPERT.fullmatch(name):
        return [expert_name(name, expert) for expert in range(experts)]
    return [hf_name(name, layout)]


def hf_tensors(model: Model, layout: ExpertLayout) -> dict[str, LazyTensor]:
    """The tensors of a model under their Hugging Face names, in the order of the forward pass."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        if layout == "unstacked" and EXPERT.fullmatch(name):
            for expert in range(tensor.shape[0]):
                tensors[expert_name(name, expert)] = row_of(tensor, expert, transposed=True)
        else:
            tensors[hf_name(name, layout)] = tensor
    return tensors


def write_hf(
    model: Model, directory: Path, layout: ExpertLayout, max_shard: int, progress: Progress
) -> Path:
    """Write a directory that did not exist, or nothing.

    Args:
        model: what to write.
        directory: where.
        layout: of the experts.
        max_shard: bytes of one file, except for a tensor that is larger.
        progress: told of the bytes written.

    Raises:
        CheckpointError: the directory exists, the disk is full, or the layout cannot say what this
            model is.
    """
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors.values()}
    config = to_hf(model.config, model.vocab_size, min(dtypes, key=_width))
    with new_directory(directory, model.bytes) as temporary:
        for name, value in _written(model, temporary, layout, max_shard, progress):
            write_json(temporary / name, value)
        write_json(temporary / CONFIG, config)
        for file in model.tokenizer_files:
            shutil.copyfile(file, temporary / file.name)
    return directory


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]


def _written(
    model: Model, directory: Path, layout: ExpertLayout, max_shard: int, progress: Progress
) -> Iterator[tuple[str, Any]]:
    """Write the tensor files; yields the index, if there are several."""
    tensors = hf_tensors(model, layout)
    shards = shards_of(tensors, max_shard)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else SINGLE
        pending = [tensors[name].pending(name, progress) for name in names]
        write_tensors(directory / file, pending, FORMAT_METADATA)
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors.values())
        yield INDEX, {"metadata": {"total_size": total}, "weight_map": where}
