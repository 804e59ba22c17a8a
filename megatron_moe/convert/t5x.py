"""t5x (flaxformer) checkpoints of OpenMoE: parameter names, and a zarr array per parameter.

Kernels are stored [in, out], the transpose of the logical model; experts [E, in, out] and the
embedding [V, H] are not transposed. Source: the released checkpoints, and the script that converted
them to Hugging Face ones. `t5x_tree.py` reads and writes the `checkpoint` file beside the arrays.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.convert.hf_files import check_no_extra
from megatron_moe.convert.model import LazyTensor, LogicalModel, of_tensor
from megatron_moe.convert.t5x_tree import FILE, leaves, library, read_tree, step_of, write_tree
from megatron_moe.convert.writing import Progress, new_directory, write_error
from megatron_moe.errors import Corrupt
from megatron_moe.model.logical import logical_parameters

CHUNK_BYTES = 64 << 20
"""Approximate bytes of one chunk file of an array, as in t5x."""
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_WHOLE = {
    "embedding.weight": ("token_embedder/embedding", False),
    "final_norm.weight": ("decoder/decoder_norm/scale", False),
    "output.weight": ("decoder/logits_dense/kernel", True),
}
_LAYER = {
    "attention_norm.weight": ("pre_self_attention_layer_norm/scale", False),
    "attention.query.weight": ("self_attention/query/kernel", True),
    "attention.key.weight": ("self_attention/key/kernel", True),
    "attention.value.weight": ("self_attention/value/kernel", True),
    "attention.output.weight": ("self_attention/out/kernel", True),
    "ffn_norm.weight": ("pre_mlp_layer_norm/scale", False),
    "ffn.gate.weight": ("mlp/wi_0/kernel", True),
    "ffn.up.weight": ("mlp/wi_1/kernel", True),
    "ffn.down.weight": ("mlp/wo/kernel", True),
    "moe.router.weight": ("mlp/router/router_weights/w/kernel", True),
    "moe.experts.gate": ("mlp/expert/wi_0/kernel", False),
    "moe.experts.up": ("mlp/expert/wi_1/kernel", False),
    "moe.experts.down": ("mlp/expert/wo/kernel", False),
    "shared_norm.weight": ("pre_extra_mlp_layer_norm/scale", False),
    "shared.gate.weight": ("extra_mlp/wi_0/kernel", True),
    "shared.up.weight": ("extra_mlp/wi_1/kernel", True),
    "shared.down.weight": ("extra_mlp/wo/kernel", True),
}


def t5x_name(name: str) -> tuple[str, bool]:
    """The path of a logical tensor below `target`, and whether it is stored transposed.

    Raises:
        KeyError: t5x has no such parameter.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    _, number, rest = name.split(".", 2)
    path, transposed = _LAYER[rest]
    return f"decoder/layers_{number}/{path}", transposed


def read_t5x(directory: Path, config: RunConfig) -> LogicalModel:
    """Read a checkpoint directory.

    Args:
        directory: directory of the file `checkpoint`.
        config: configuration of the model, which t5x keeps in gin files elsewhere.

    Raises:
        UsageError: a file is missing or damaged, or the checkpoint is of another model.
    """
    tree = read_tree(directory)
    found = dict(leaves(tree["target"]))
    embedding = _array(directory, "token_embedder/embedding", found, False)
    vocab_size = embedding.shape[0]
    tensors, used = {}, set()
    for name in logical_parameters(config.model, config.moe, vocab_size):
        path, transposed = t5x_name(name)
        used.add(path)
        tensors[name] = _array(directory, path, found, transposed)
    check_no_extra(directory, found.keys() - used)
    return LogicalModel(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        step=step_of(tree),
    )


def _array(directory: Path, path: str, found: dict[str, Any], transposed: bool) -> LazyTensor:
    """One parameter; rows of a transposed one are read as columns of the stored array."""
    if path not in found:
        expected = "a checkpoint with all tensors of the model"
        raise Corrupt(str(directory), f"one without {path}", expected)
    leaf = found[path]
    if not isinstance(leaf, dict):
        values = _as_torch(np.array(leaf))
        return of_tensor(values.t() if transposed else values)
    array = _open_array(directory, path, leaf)
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise Corrupt(f"dtype of {path} in {directory}", dtype, f"one of {', '.join(_DTYPES)}")

    def rows(start: int, stop: int) -> Tensor:
        if transposed:
            return _as_torch(array[:, start:stop].read().result()).t()
        return _as_torch(array[start:stop].read().result())

    shape = tuple(array.shape)
    return LazyTensor(shape[::-1] if transposed else shape, _DTYPES[dtype], rows)


def _open_array(directory: Path, path: str, spec: dict[str, Any]) -> Any:
    """Open the array of a spec.

    Only the last component of its path is used, with the local file driver, whatever store the
    array was written to: a spec could otherwise name any file or URL.
    """
    store = spec.get("kvstore")
    inner = spec.get("path") or (store.get("path") if isinstance(store, dict) else None)
    folder = directory / str(inner)
    if not inner or folder.resolve().parent != directory.resolve():
        raise Corrupt(f"path of {path} in {directory / FILE}", inner, "a folder next to that file")
    local: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
    }
    try:
        return library("tensorstore").open(local, open=True, read=True).result()
    except (ValueError, OSError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise Corrupt(str(folder), reason, "a zarr array") from None


def _as_torch(values: Any) -> Tensor:
    values = np.ascontiguousarray(values)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(library("ml_dtypes").bfloat16)
    return tensor.numpy()


def write_t5x(model: LogicalModel, directory: Path, progress: Progress) -> Path:
    """Write a new checkpoint directory, complete or not at all. Optimizer state is empty.

    Raises:
        CheckpointError: the directory exists, or the disk is full.
    """
    try:
        with new_directory(directory, model.bytes) as temporary:
            specs = {}
            for name, tensor in model.tensors.items():
                path, transposed = t5x_name(name)
                specs[path] = _write_array(temporary, path, tensor, transposed, progress)
            write_tree(temporary / FILE, specs, model.step)
    except ValueError as error:  # how TensorStore reports that it cannot write
        raise write_error(directory, model.bytes, error) from error
    return directory


def _write_array(
    directory: Path, path: str, tensor: LazyTensor, transposed: bool, progress: Progress
) -> dict[str, Any]:
    """Write one array; returns its spec for the tree."""
    shape = tensor.shape[::-1] if transposed else tensor.shape
    dtype = {kind: name for name, kind in _DTYPES.items()}[tensor.dtype]
    folder = "target." + path.replace("/", ".")
    metadata = {
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(shape),
        "chunks": _chunks(shape, tensor.dtype.itemsize),
    }
    spec = {
        "driver": "zarr",
        "dtype": dtype,
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata,
    }
    here = {**spec, "kvstore": {"driver": "file", "path": str(directory / folder)}}
    array = library("tensorstore").open(here, create=True).result()
    start = 0
    for part in tensor.parts():
        stop = start + part.shape[0]
        place = array[:, start:stop] if transposed else array[start:stop]
        place.write(_as_numpy(part.t() if transposed else part)).result()
        progress(part.numel() * part.element_size())
        start = stop
    return spec


def _chunks(shape: tuple[int, ...], width: int) -> list[int]:
    """Halve the longest side until a chunk is small enough."""
    chunks = list(shape)
    while prod(chunks) * width > CHUNK_BYTES:
        longest = chunks.index(max(chunks))
        chunks[longest] = -(-chunks[longest] // 2)
    return chunks
