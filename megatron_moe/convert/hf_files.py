"""The tensor files of a Hugging Face checkpoint: safetensors, or PyTorch's own, weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.checkpoint.tensor_files import TORCH_DTYPES
from megatron_moe.convert.lazy import LazyTensor, of_tensor
from megatron_moe.errors import Corrupt

_PATTERNS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Begin and end of the names of tensor files, in the order of preference."""


def open_files(directory: Path) -> dict[str, LazyTensor]:
    """All tensors of a directory by their name there.

    Raises:
        Corrupt: there are no such files, one is missing or damaged, or the index is wrong.
    """
    for begin, end in _PATTERNS:
        index, single = directory / f"{begin}{end}.index.json", directory / f"{begin}{end}"
        read = _safetensors if end == ".safetensors" else _pickled
        if index.is_file():
            return _indexed(directory, index, read)
        if single.is_file():
            return read(single)
    expected = "with model.safetensors, pytorch_model.bin, or the index of one"
    raise Corrupt(str(directory), "a directory without weights", expected)


def _indexed(
    directory: Path, index: Path, read: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Corrupt(f"weight_map in {index}", type(where).__name__, "an object of file names")
    found: dict[str, LazyTensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise Corrupt(f"file in {index}", file, "a name inside the directory")
        found.update(read(directory / file))
    if found.keys() != where.keys():
        odd = sorted(found.keys() ^ where.keys())[0]
        raise Corrupt(f"{odd} in {index}", "not where the index says", "in its file and listed")
    return found


def _safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            heads = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 no mapping
            return {
                key: _slice(path, key, tuple(head.get_shape()), head.get_dtype())
                for key, head in heads.items()
            }
    except (SafetensorError, OSError) as error:
        raise Corrupt(str(path), str(error), "a safetensors file") from None


def _slice(path: Path, key: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    if dtype not in TORCH_DTYPES:
        raise Corrupt(f"{key} in {path}", dtype, f"one of {', '.join(TORCH_DTYPES)}")

    def rows(start: int, stop: int) -> Tensor:
        # CheckpointMetadata each time: what was mapped for one part is given back before the next.
        with safe_open(str(path), framework="pt") as file:
            part: Tensor = file.get_slice(key)[start:stop]
            return part

    return LazyTensor(shape, TORCH_DTYPES[dtype], rows)


def _pickled(path: Path) -> dict[str, LazyTensor]:
    """PyTorch's format, with its loader that builds tensors and runs nothing else."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Corrupt(str(path), reason, "tensors in PyTorch's format") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise Corrupt(str(path), type(found).__name__, "a mapping of names to tensors")
    return {name: of_tensor(tensor) for name, tensor in found.items()}
