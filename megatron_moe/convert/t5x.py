"""t5x checkpoints of OpenMoE: the msgpack tree, and a zarr array for each parameter."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.convert.lazy import LazyTensor, of_tensor
from megatron_moe.convert.model import Model
from megatron_moe.convert.new_directory import new_directory, no_room
from megatron_moe.convert.sharding import Progress
from megatron_moe.convert.t5x_names import t5x_name
from megatron_moe.convert.t5x_tree import FILE, leaves, library, read_tree, step_of, write_tree
from megatron_moe.errors import Corrupt
from megatron_moe.model.logical import logical_parameters

CHUNK_BYTES = 64 << 20
"""About how much one file of an array holds, as t5x chooses it."""
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def read_t5x(directory: Path, config: RunConfig) -> Model:
    """A checkpoint directory.

    Args:
        directory: with the file `checkpoint` in it.
        config: of the model, which t5x keeps elsewhere (in gin files).

    Raises:
        UsageError: a file is missing or damaged, or it is another model.
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
    extra = sorted(found.keys() - used)
    if extra:
        raise Corrupt(str(directory), f"with {', '.join(extra[:5])}", "no tensor but the model's")
    return Model(
        source=str(directory),
        config=config,
        vocab_size=vocab_size,
        tensors=tensors,
        step=step_of(tree),
    )


def _array(directory: Path, path: str, found: dict[str, Any], transposed: bool) -> LazyTensor:
    """One parameter; a transposed one's rows are columns there, and read as such."""
    if path not in found:
        raise Corrupt(str(directory), f"without {path}", "all tensors of the model")
    leaf = found[path]
    if not isinstance(leaf, dict):
        values = _as_torch(np.array(leaf))
        return of_tensor(values.t() if transposed else values)
    array = _opened(directory, path, leaf)
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise Corrupt(f"{path} in {directory}", dtype, f"one of {', '.join(_DTYPES)}")

    def rows(start: int, stop: int) -> Tensor:
        if transposed:
            return _as_torch(array[:, start:stop].read().result()).t()
        return _as_torch(array[start:stop].read().result())

    shape = tuple(array.shape)
    return LazyTensor(shape[::-1] if transposed else shape, _DTYPES[dtype], rows)


def _opened(directory: Path, path: str, spec: dict[str, Any]) -> Any:
    """The array that a spec names, inside the directory whatever store it was written to."""
    store = spec.get("kvstore")
    inner = spec.get("path") or (store.get("path") if isinstance(store, dict) else None)
    folder = directory / str(inner)
    if not inner or folder.resolve().parent != directory.resolve():
        raise Corrupt(f"path of {path} in {directory / FILE}", inner, "a folder beside it")
    wanted: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder)},
    }
    try:
        return library("tensorstore").open(wanted, open=True, read=True).result()
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


def write_t5x(model: Model, directory: Path, progress: Progress) -> Path:
    """Write a directory that did not exist, or nothing. Optimizer state is empty.

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
    except ValueError as error:  # so TensorStore says that it cannot write
        raise no_room(directory, model.bytes, error) from error
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
