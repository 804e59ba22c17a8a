"""Files of each format read a second time by other code, so that `--verify` notices bad readings.

What a reader gets wrong (zeros for a chunk that is missing, say) it gets wrong twice, and comparing
its own results finds nothing. These readers are other code than those of the conversion:
safetensors by header and raw bytes, zarr arrays by JSON, gzip and NumPy, chunks of Megatron-LM by
PyTorch (their places are those of `.metadata` in both readings). They are slow and plain.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.index import block_key
from megatron_moe.checkpoint.tensor_files import bytes_of
from megatron_moe.convert.hf_files import open_files
from megatron_moe.convert.megatron import checkpoint_folder, model_tensors
from megatron_moe.convert.model import LazyTensor, LogicalModel
from megatron_moe.convert.t5x import t5x_name
from megatron_moe.convert.t5x_arrays import array_folder, open_array
from megatron_moe.convert.t5x_tree import leaves, read_tree
from megatron_moe.errors import Corrupt
from megatron_moe.model.sharding.blocks import MODEL

Progress = Callable[[int], object]
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "bfloat16": torch.bfloat16,
}
_DECOMPRESS: dict[str | None, Callable[[bytes], bytes]] = {
    None: lambda data: data,
    "gzip": gzip.decompress,
    "zlib": zlib.decompress,
}


def raw_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file: 8 bytes of length, a JSON header, then raw numbers.

    Raises:
        Corrupt: a tensor has a dtype that no model here has.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)

    def tensor(name: str, entry: dict[str, Any]) -> LazyTensor:
        shape, dtype = tuple(entry["shape"]), _TORCH.get(entry["dtype"])
        if dtype is None:
            raise Corrupt(f"{name} in {file}", entry["dtype"], f"one of {', '.join(_TORCH)}")
        first, last = entry["data_offsets"]
        row = (last - first) // max(1, shape[0] if shape else 1)

        def rows(start: int, stop: int) -> Tensor:
            with file.open("rb") as stream:
                stream.seek(8 + length + first + start * row)
                data = bytearray(stream.read((stop - start) * row))
            return torch.frombuffer(data, dtype=dtype).view(stop - start, *shape[1:])

        return LazyTensor(shape, dtype, rows)

    return {name: tensor(name, entry) for name, entry in header.items()}


def raw_zarr(folder: Path, transposed: bool) -> LazyTensor:
    """A zarr array put together from its chunk files; a missing file is an `OSError`."""
    head = json.loads((folder / ".zarray").read_text())
    shape, chunks = tuple(head["shape"]), tuple(head["chunks"])
    dtype = _TORCH[head["dtype"]]
    compressor = head["compressor"] and head["compressor"]["id"]
    kind = np.dtype(np.int16) if dtype == torch.bfloat16 else np.dtype(head["dtype"])
    separator = head.get("dimension_separator", ".")
    if head["order"] != "C" or head.get("filters") or compressor not in _DECOMPRESS:
        found = f"order {head['order']}, filters {head.get('filters')}, {compressor}"
        raise Corrupt(str(folder), found, "an array in C order, without filters, gzip or zlib")
    axis = len(shape) - 1 if transposed else 0

    def rows(start: int, stop: int) -> Tensor:
        sizes = [*shape]
        sizes[axis] = stop - start
        out = np.empty(sizes, kind)
        counts = [range(-(-n // c)) for n, c in zip(shape, chunks, strict=True)]
        counts[axis] = range(start // chunks[axis], -(-stop // chunks[axis]))
        for place in itertools.product(*counts):
            data = (folder / separator.join(map(str, place))).read_bytes()
            chunk = np.frombuffer(_DECOMPRESS[compressor](data), kind).reshape(chunks)
            theirs, ours = [], []
            for dimension, (number, size) in enumerate(zip(place, chunks, strict=True)):
                low = start if dimension == axis else 0
                high = stop if dimension == axis else shape[dimension]
                first, last = max(low, number * size), min(high, (number + 1) * size)
                theirs.append(slice(first - number * size, last - number * size))
                ours.append(slice(first - low, last - low))
            out[tuple(ours)] = chunk[tuple(theirs)]
        values = torch.from_numpy(out).view(dtype)
        return values.t() if transposed else values

    return LazyTensor(shape[::-1] if transposed else shape, dtype, rows)


SAFETENSORS = "by safetensors header and raw bytes"
CHUNKS = "by PyTorch's weights-only loader"
ZARR = "chunk by chunk with gzip and NumPy"


def verify_result(
    model: LogicalModel,
    planned: Mapping[str, LazyTensor],
    format_name: str,
    where: Path,
    progress: Progress,
) -> str:
    """Compare the files of a result with the tensors that were to be written.

    Args:
        model: what was written.
        planned: its tensors by their names in the format.
        format_name: one of `formats.FORMATS`.
        where: the directory that was written.
        progress: called with the bytes of each tensor.

    Returns:
        What was compared with what, in a line.

    Raises:
        Corrupt: a file or a tensor differs.
    """
    if format_name == "t5x":
        names = {f"target/{path}": (path, t) for path, t in map(t5x_name, model.tensors)}
        tensors = {
            name: raw_zarr(where / f"target.{path.replace('/', '.')}", transposed)
            for name, (path, transposed) in names.items()
        }
        how = ZARR
    else:
        tensors, how = {}, SAFETENSORS
        for file in sorted(where.glob("*.safetensors")):
            tensors.update(raw_safetensors(file))
    if format_name == "native":
        files = check_manifest(where)
        how += f"; its {files} files have the SHA-256 of manifest.json"
        planned = {block_key(MODEL, n, (0,) * len(t.shape)): t for n, t in planned.items()}
    compare(tensors, planned, str(where), progress)
    return f"{len(tensors)} tensors of {where}, read {how}, equal those of {model.source} (SHA-256)"


def verify_source(format_name: str, path: Path, progress: Progress, step: int | None = None) -> str:
    """Compare what the conversion's reader sees in a source with a second reading.

    Args:
        format_name: one of `formats.SOURCES`.
        path: directory of the checkpoint.
        progress: called with the bytes of each tensor.
        step: iteration of a Megatron-LM checkpoint, by default the tracker's.

    Returns:
        What was compared with what, in a line.

    Raises:
        Corrupt: they differ.
    """
    if format_name == "t5x":
        specs = {n: s for n, s in leaves(read_tree(path)["target"]) if isinstance(s, dict)}
        first = {name: open_array(path, name, spec, False) for name, spec in specs.items()}
        second = {n: raw_zarr(array_folder(path, n, s), False) for n, s in specs.items()}
        compare(first, second, str(path), progress)
        return f"{len(first)} arrays of {path}, read by TensorStore, equal those read {ZARR}"
    if format_name == "hf":
        second = {}
        for file in _weight_files(path):
            second.update(raw_safetensors(file))
        if not second:
            return f"weights of {path} in PyTorch's format have no second reader: not compared"
        first = open_files(path)
        compare(
            first, {name: second[name] for name in first if name in second}, str(path), progress
        )
        return (
            f"{len(first)} tensors of {path}, read by safetensors, equal those read {SAFETENSORS}"
        )
    if format_name == "megatron":
        return _verify_chunks(checkpoint_folder(path, step), progress)
    return f"files of {path} have the SHA-256 of its manifest.json"


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model; others that lie beside them are not its weights."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    return [single] if single.is_file() else []


def _verify_chunks(folder: Path, progress: Progress) -> str:
    """Compare each chunk of a Megatron-LM model with what PyTorch's weights-only loader reads.

    Where a chunk lies in the files and in its tensor is known from `.metadata` alone, for both.
    """
    tensors = model_tensors(folder)
    count = 0
    for name, stored in tensors.items():
        for chunk in stored.chunks:
            what = f"{name} in {chunk.file}"
            with chunk.file.open("rb") as stream:
                stream.seek(chunk.start)
                data = io.BytesIO(stream.read(chunk.length))
            try:
                second = torch.load(data, map_location="cpu", weights_only=True).detach()
            except Exception as error:  # a damaged or hostile file may raise anything
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise Corrupt(what, reason, "readable a second time") from None
            ends = (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
            first = stored.read(list(zip(chunk.offsets, ends, strict=True)))
            if first.dtype != second.dtype or _raw(first) != _raw(second):
                raise Corrupt(what, "other values", "the same in both readings")
            progress(first.numel() * first.element_size())
            count += 1
    return (
        f"{count} chunks of {len(tensors)} tensors of {folder}, mapped, equal those read {CHUNKS}"
    )


def _raw(tensor: Tensor) -> bytes:
    return bytes(bytes_of(tensor))


def compare(
    found: Mapping[str, LazyTensor],
    expected: Mapping[str, LazyTensor],
    source: str,
    progress: Progress,
) -> None:
    """Require the same names, shapes, dtypes and SHA-256.

    Raises:
        Corrupt: the first difference.
    """
    for name in sorted(found.keys() ^ expected.keys()):
        raise Corrupt(f"{name} in {source}", "in one reading only", "in both readings")
    for name, tensor in expected.items():
        try:
            same = found[name].digest() == tensor.digest()
        except (OSError, ValueError, RuntimeError, EOFError, zlib.error) as error:
            raise Corrupt(f"{name} in {source}", str(error), "readable a second time") from None
        if not same:
            raise Corrupt(f"{name} in {source}", "other values", "the same in both readings")
        progress(tensor.bytes)


def check_manifest(directory: Path) -> int:
    """Compare the files of a native checkpoint with `manifest.json`; returns their number.

    Raises:
        Corrupt: one differs.
    """
    files = json.loads((directory / "manifest.json").read_text())["files"]
    for name, record in files.items():
        digest = hashlib.sha256()
        with (directory / name).open("rb") as stream:
            while block := stream.read(16 << 20):
                digest.update(block)
        if digest.hexdigest() != record["sha256"]:
            raise Corrupt(str(directory / name), digest.hexdigest(), record["sha256"])
    return len(files)
