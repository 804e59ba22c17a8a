"""Hugging Face checkpoints of OpenMoE: tensor names, `config.json`, safetensors, tokenizer files.

Matrices are stored [out, in] as in the logical model. Experts come in two public layouts: `stacked`
[E, in, out] as in the logical model, and `unstacked`, one [out, in] matrix per expert. Source: the
released checkpoints and the script that converted them from t5x.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_moe.checkpoint.disk import read_json, write_json
from megatron_moe.checkpoint.tensor_files import FORMAT_METADATA, write_tensors
from megatron_moe.config import RunConfig
from megatron_moe.convert.hf_config import from_hf, to_hf
from megatron_moe.convert.hf_files import CONFIG, check_no_extra, open_files
from megatron_moe.convert.hf_text import text_files, tokenizer_code
from megatron_moe.convert.model import LazyTensor, LogicalModel, row_of, stacked
from megatron_moe.convert.modeling import FILES
from megatron_moe.convert.writing import Progress, new_directory, split_into_files
from megatron_moe.errors import Corrupt
from megatron_moe.model.logical import logical_parameters
from megatron_moe.tokenizer.files import files_in, stored_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
ExpertLayout = Literal["stacked", "unstacked"]

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "shared_norm.weight": "pre_extra_mlp_layernorm.weight",
    "shared.gate.weight": "extra_mlp.gate_proj.weight",
    "shared.up.weight": "extra_mlp.up_proj.weight",
    "shared.down.weight": "extra_mlp.down_proj.weight",
}
_ROUTER = {"stacked": "mlp.gate_weight", "unstacked": "mlp.gate.weight"}
_STACKED = {"gate": "wi_gate", "up": "wi_up", "down": "wo"}

EXPERT = re.compile(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)")
"""Logical names of the experts of a layer."""


def hf_name(name: str, layout: ExpertLayout) -> str:
    """The Hugging Face name of a logical tensor; of experts, the name of the whole stack.

    Raises:
        KeyError: the layout has no such tensor.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    _, number, rest = name.split(".", 2)
    prefix = f"model.layers.{number}"
    if rest == "moe.router.weight":
        return f"{prefix}.{_ROUTER[layout]}"
    found = EXPERT.fullmatch(name)
    if found:
        return f"{prefix}.mlp.experts.{_STACKED[found[2]]}"
    return f"{prefix}.{_LAYER[rest]}"


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix in the `unstacked` layout."""
    found = EXPERT.fullmatch(name)
    if not found:
        raise KeyError(name)
    return f"model.layers.{found[1]}.mlp.experts.{expert}.{found[2]}_proj.weight"


def layout_of(names: set[str]) -> ExpertLayout:
    """The expert layout of a set of names."""
    return "unstacked" if any(".mlp.experts.0." in name for name in names) else "stacked"


def read_hf(directory: Path) -> LogicalModel:
    """Read a checkpoint directory of OpenMoE, with either layout of the experts.

    Raises:
        UsageError: a file is missing or damaged, or it is another kind of model.
    """
    source = directory / CONFIG
    config, vocab_size = from_hf(read_json(source), str(source))
    return model_of(directory, open_files(directory), config, vocab_size)


def model_of(
    directory: Path, found: dict[str, LazyTensor], config: RunConfig, vocab_size: int
) -> LogicalModel:
    """The model of a checkpoint directory, with its tensors by logical name.

    Args:
        directory: of the files; its tokenizer goes with the model.
        found: the tensors of its files, by their Hugging Face names.
        config: of the model.
        vocab_size: V.

    Raises:
        Corrupt: a tensor is missing, unexpected or of another shape.
    """
    layout = layout_of(set(found))
    tensors: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name, parameter in logical_parameters(config.model, config.moe, vocab_size).items():
        names = _names(name, layout, config.moe.num_experts)
        missing = [each for each in names if each not in found]
        if missing:
            expected = f"a checkpoint with all {len(names)} tensors of {name}"
            raise Corrupt(str(directory), f"one without {missing[0]}", expected)
        used.update(names)
        each = [found[n] for n in names]
        is_stack = layout == "unstacked" and EXPERT.fullmatch(name)
        tensors[name] = stacked(each, transposed=True) if is_stack else each[0]
        if tensors[name].shape != parameter.shape:
            shapes = list(tensors[name].shape), str(list(parameter.shape))
            raise Corrupt(f"shape of {names[0]} in {directory}", *shapes)
    check_no_extra(directory, set(found) - used)
    return LogicalModel(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        tokenizer_files=files_in(directory),
    )


def _names(name: str, layout: ExpertLayout, experts: int) -> list[str]:
    if layout == "unstacked" and EXPERT.fullmatch(name):
        return [expert_name(name, expert) for expert in range(experts)]
    return [hf_name(name, layout)]


def hf_tensors(model: LogicalModel, layout: ExpertLayout) -> dict[str, LazyTensor]:
    """The tensors of a model under their Hugging Face names, in forward order."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.tensors.items():
        if layout == "unstacked" and EXPERT.fullmatch(name):
            for expert in range(tensor.shape[0]):
                tensors[expert_name(name, expert)] = row_of(tensor, expert, transposed=True)
        else:
            tensors[hf_name(name, layout)] = tensor
    return tensors


def write_hf(
    model: LogicalModel,
    directory: Path,
    layout: ExpertLayout,
    max_shard: int,
    progress: Progress,
    describe: Callable[[RunConfig, int, str], dict[str, Any]] | None = None,
) -> Path:
    """Write a new checkpoint directory, complete or not at all.

    Args:
        model: the model to write.
        directory: the directory, which must not exist.
        layout: layout of the experts.
        max_shard: maximal bytes of a file; a larger tensor gets its own.
        progress: called with the bytes written.
        describe: contents of `config.json` of a class of transformers, from configuration,
            vocabulary size and dtype; `None` writes OpenMoE's own, with the code that reads it.

    Raises:
        CheckpointError: the directory exists, the disk is full, or the format cannot represent this
            model.
    """
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors.values()}
    # `torch_dtype` is one value for all tensors: of mixed ones, the narrowest.
    dtype = min(dtypes, key=_width)
    files = FILES if describe is None else ()
    describe = describe or partial(to_hf, layout=layout)
    config = describe(model.config, model.vocab_size, dtype)
    texts = text_files(model, own=bool(files))
    config.update({k: v for k, v in texts.get(GENERATION, {}).items() if k in config})
    with new_directory(directory, model.bytes) as temporary:
        for name, value in _write_tensors(model, temporary, layout, max_shard, progress):
            write_json(temporary / name, value)
        write_json(temporary / CONFIG, config)
        for file in files or tokenizer_code(model):
            shutil.copyfile(file, temporary / file.name)
        for file in model.tokenizer_files:
            shutil.copyfile(file, temporary / stored_name(file))
        for name, value in texts.items():
            write_json(temporary / name, value)
    return directory


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]


def _write_tensors(
    model: LogicalModel, directory: Path, layout: ExpertLayout, max_shard: int, progress: Progress
) -> Iterator[tuple[str, Any]]:
    """Write the tensor files; yields name and contents of the index if there are several."""
    tensors = hf_tensors(model, layout)
    shards = split_into_files(tensors, max_shard)
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
