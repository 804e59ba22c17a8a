"""Files of a Hugging Face checkpoint directory: fields of `config.json` and weights, checked.

Files of other programs are not trusted: numbers are bounded before lists are made from them, paths
stay inside the directory, and `pytorch_model*.bin` is read with PyTorch's weights-only loader.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.checkpoint.disk import read_json
from megatron_moe.checkpoint.tensor_files import TORCH_DTYPES
from megatron_moe.convert.model import LazyTensor, of_tensor
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.files import describe_file_start, is_file_name, open_regular

CONFIG = "config.json"
MANY = 1 << 16
"""Upper bound of counts: more layers, experts or heads than any model has."""
SIZE = 1 << 31
"""Upper bound of sizes: a larger width or vocabulary than any model has."""
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
"""Names under which training programs keep the tensors of a model in a `.bin` file."""
_DEPTH = 4
"""Objects inside each other, the tensors' own included. A file may hold one that holds itself."""
_PREFIX = "module."
_PATTERNS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Prefix and suffix of the names of weight files, in order of preference."""


def whole_number(
    values: Mapping[str, Any], key: str, source: str, default: int | None = None, most: int = MANY
) -> int:
    """A field that is a count or a size.

    Args:
        values: contents of ``source``.
        key: name of the field.
        source: the file, for messages.
        default: value of an absent or null field; without a default the field is required.
        most: largest accepted value.

    Raises:
        CheckpointError: the field is missing or not such a number.
    """
    found = values.get(key)
    if found is None and default is not None:
        return default
    if type(found) is not int or not 1 <= found <= most:
        expected = f"an integer from 1 to {most}"
        raise CheckpointError(f"{key} in {source}", found, expected)
    return found


def query_groups(values: Mapping[str, Any], heads: int, source: str) -> int:
    """Key and value heads: `num_key_value_heads`, or ``heads`` if it is absent.

    Raises:
        CheckpointError: the field is not a divisor of ``heads``.
    """
    groups = whole_number(values, "num_key_value_heads", source, heads)
    if heads % groups:
        expected = f"a divisor of num_attention_heads ({heads})"
        raise CheckpointError(f"num_key_value_heads in {source}", groups, expected)
    return groups


def number(values: Mapping[str, Any], key: str, source: str, default: float) -> float:
    """A field that is a finite number >= 0; ``default`` if it is absent.

    Raises:
        CheckpointError: the field is not such a number.
    """
    found = values.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not _is_finite(found):
        raise CheckpointError(f"{key} in {source}", found, "a finite number >= 0")
    return float(found)


def rotary_base(values: Mapping[str, Any], source: str, default: float = 1e4) -> float:
    """The base of the rotary embedding: `rope_theta`, or `rope_parameters` of newer files.

    Releases of `transformers` from the fifth on move `rope_theta` and `rope_scaling` into
    `rope_parameters` when they save a configuration.

    Raises:
        CheckpointError: another rotary embedding than the plain one over all channels, or two
            values that contradict each other.
    """
    top = number(values, "rope_theta", source, default)
    found = top
    for key in ("rope_scaling", "rope_parameters"):
        inner = values.get(key)
        if inner is None:
            continue
        where = f"{key} in {source}"
        if not isinstance(inner, Mapping) or any(isinstance(v, Mapping) for v in inner.values()):
            raise CheckpointError(where, inner, "one set of parameters for all layers")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default":
            expected, fix = "'default'", "scaled rotary embeddings are not implemented"
            raise CheckpointError(f"rope_type of {where}", kind, expected, fix)
        if inner.get("partial_rotary_factor", 1.0) != 1.0:
            factor = inner["partial_rotary_factor"]
            raise CheckpointError(f"partial_rotary_factor of {where}", factor, "1.0")
        found = number(inner, "rope_theta", where, top)
        if "rope_theta" in values and found != top:
            raise CheckpointError(f"rope_theta of {where}", found, f"{top} as in the same file")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        factor = values["partial_rotary_factor"]
        raise CheckpointError(f"partial_rotary_factor in {source}", factor, "1.0")
    return found


def _is_finite(found: float) -> bool:
    try:
        return math.isfinite(found) and found >= 0
    except OverflowError:  # an integer larger than every float
        return False


def check_no_extra(directory: Path, extra: set[str]) -> None:
    """Require that a directory holds no tensors besides the model's.

    Raises:
        Corrupt: it does; the first five are named.
    """
    if extra:
        found = f"one that also has {', '.join(sorted(extra)[:5])}"
        raise Corrupt(str(directory), found, "a checkpoint with the tensors of the model alone")


def open_files(directory: Path) -> dict[str, LazyTensor]:
    """All tensors of a directory by their name in its files.

    Raises:
        Corrupt: there are no weight files, one is missing or damaged, or the index is wrong.
    """
    for prefix, suffix in _PATTERNS:
        index, single = directory / f"{prefix}{suffix}.index.json", directory / f"{prefix}{suffix}"
        read = _safetensors if suffix == ".safetensors" else _pytorch
        if index.is_file():
            return _indexed(directory, index, read)
        if single.is_file():
            return read(single)
    expected = "a directory with model.safetensors, pytorch_model.bin, or the index of one"
    raise Corrupt(str(directory), "a directory without weights", expected)


def _indexed(
    directory: Path, index: Path, read: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Corrupt(f"weight_map in {index}", type(where).__name__, "an object of file names")
    found: dict[str, LazyTensor] = {}
    for file in sorted(set(where.values())):
        if not is_file_name(file):
            # A name with a path in it could lead out of the directory.
            raise Corrupt(f"file name in {index}", file, "a file of the same directory")
        found.update(read(directory / file))
    if found.keys() != where.keys():
        name = sorted(found.keys() ^ where.keys())[0]
        raise Corrupt(f"{name} in {index}", "only one of these", "both in the index and in a file")
    return found


def _safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        open_regular(path).close()
        with safe_open(str(path), framework="pt") as file:
            heads = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 no mapping
            return {
                key: _slice(path, key, tuple(head.get_shape()), head.get_dtype())
                for key, head in heads.items()
            }
    except (SafetensorError, OSError) as error:
        fix = describe_file_start(path)
        raise Corrupt(str(path), str(error), "a safetensors file", fix) from None


def _slice(path: Path, key: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    if dtype not in TORCH_DTYPES:
        fix = "convert quantized weights to fp32, bf16 or fp16"
        raise Corrupt(f"{key} in {path}", dtype, f"one of {', '.join(TORCH_DTYPES)}", fix)

    def rows(start: int, stop: int) -> Tensor:
        # Opened for each range: closing unmaps its pages, so memory does not grow with the file.
        with safe_open(str(path), framework="pt") as file:
            part: Tensor = file.get_slice(key)[start:stop]
            return part

    return LazyTensor(shape, TORCH_DTYPES[dtype], rows)


def _pytorch(path: Path) -> dict[str, LazyTensor]:
    """A `.bin` file, read with the weights-only loader, which builds tensors and runs no code."""
    # Before its release 1.6 PyTorch wrote no zip archive; such a file cannot be mapped into memory.
    mapped = False
    try:
        with open_regular(path) as file:
            mapped = zipfile.is_zipfile(file)
            if mapped:
                _check_records(file)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        expected, fix = "tensors in PyTorch's format", describe_file_start(path)
        raise Corrupt(str(path), reason, expected, "" if mapped else fix) from None
    tensors = _unwrapped(found)
    if tensors is None:
        raise Corrupt(str(path), _summary(found), "a mapping of names to tensors")
    return {name: of_tensor(tensor) for name, tensor in tensors.items()}


def _check_records(file: BinaryIO) -> None:
    """Require that no record is compressed, as PyTorch writes them, nor larger than the file.

    Raises:
        ValueError: one is; it could take any memory.
    """
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                sizes = f"{info.file_size} bytes, {info.compress_size} compressed"
                raise ValueError(f"{info.filename} with {sizes}, in a file of {size}")


def _unwrapped(found: Any) -> dict[str, Tensor] | None:
    """The tensors of a training program's file, which keeps them under a name of `WRAPPERS`.

    A prefix `module.` of every name, of a model wrapped for data parallelism, is removed.
    """
    for _ in range(_DEPTH):
        if not isinstance(found, Mapping):
            return None
        if found and all(isinstance(value, Tensor) for value in found.values()):
            prefixed = all(str(name).startswith(_PREFIX) for name in found)
            return {
                str(n).removeprefix(_PREFIX) if prefixed else str(n): t for n, t in found.items()
            }
        inside = [name for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        if len(inside) != 1:
            return None
        found = found[inside[0]]
    return None


def _summary(found: Any) -> str:
    if not isinstance(found, Mapping):
        return type(found).__name__
    return f"an object with {', '.join(map(str, list(found)[:5]))}"
