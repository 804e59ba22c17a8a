"""The zarr arrays of a t5x checkpoint, one folder each, read and written with TensorStore.

zarr defines a chunk without a file as the fill value. After an incomplete copy that reads as zeros,
so here a chunk without a file is an error. t5x and this module declare no fill value, and then
TensorStore writes every chunk, also one of zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe.convert.model import LazyTensor
from megatron_moe.convert.t5x_tree import FILE, library
from megatron_moe.convert.writing import Progress
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.files import is_file_name, read_small
from megatron_moe.text import json_value

CHUNK_BYTES = 64 << 20
"""Approximate bytes of one chunk file of an array, as in t5x."""
HEAD = ".zarray"
"""The JSON file with shape, chunks and compressor of an array."""
_SMALL_CHUNK = 4 * CHUNK_BYTES
"""Bytes of a chunk that may have a file of any size: zeros compress well."""
_MOST_RATIO = 1100
"""Of compression: 1032 is the most of deflate."""
_WIDEST = 8
"""Bytes of an element of the widest dtype."""
STORES = ("file", "gfile", "gcs")
"""Drivers of stores with a folder per array. t5x itself reads all three as folders on a disk."""
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def open_array(directory: Path, path: str, spec: dict[str, Any], transposed: bool) -> LazyTensor:
    """The array of a spec; its metadata and the presence of every chunk are checked.

    Args:
        directory: directory of the file `checkpoint`.
        path: the parameter below `target`, for messages.
        spec: TensorStore spec in the tree. Only the last component of its path is used, with the
            local file driver, whatever store the array was written to: a spec could otherwise name
            any file or URL, and checkpoints are copied from buckets, whose paths some specs have.
        transposed: whether the tensor is the transpose; its rows are read as columns of the array.

    Raises:
        CheckpointError: a chunk or the metadata is missing, or the array is not stored as a folder
            with a file per chunk.
    """
    folder = array_folder(directory, path, spec)
    check_chunks(folder)
    # TensorStore rejects a path with `..`.
    local: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.resolve())},
        "fill_missing_data_reads": False,
    }
    try:
        array = library("tensorstore").open(local, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise Corrupt(str(folder), _reason(error, folder), "a zarr array") from None
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise Corrupt(f"dtype of {path} in {directory}", dtype, f"one of {', '.join(DTYPES)}")

    def rows(start: int, stop: int) -> Tensor:
        part = array[:, start:stop] if transposed else array[start:stop]
        try:
            values = as_torch(part.read().result())
        except (ValueError, OSError) as error:
            raise Corrupt(str(folder), _reason(error, folder), "an array of whole chunks") from None
        return values.t() if transposed else values

    shape = tuple(array.shape)
    return LazyTensor(shape[::-1] if transposed else shape, DTYPES[dtype], rows)


def array_folder(directory: Path, path: str, spec: dict[str, Any]) -> Path:
    """The folder beside the file `checkpoint` that holds an array.

    Raises:
        CheckpointError: the spec names none, or a store without folders.
    """
    store = spec.get("kvstore")
    store = store if isinstance(store, dict) else {}
    driver = store.get("driver", "file")
    if driver not in STORES:
        reason = "convert it with t5x or Orbax to one array per folder"
        what = f"store of {path} in {directory / FILE}"
        raise CheckpointError(what, driver, f"one of {', '.join(STORES)}", reason)
    inner = spec.get("path") or store.get("path")
    name = PurePosixPath(str(inner)).name
    if not inner or not is_file_name(name):
        raise Corrupt(f"path of {path} in {directory / FILE}", inner, "the name of a folder")
    folder = directory / name
    if folder.resolve().parent != directory.resolve():
        raise Corrupt(str(folder), "a link to another place", f"a folder of {directory}")
    return folder


def check_chunks(folder: Path) -> None:
    """Require the metadata of an array and a file for each of its chunks.

    Raises:
        Corrupt: a file is missing; the first is named.
    """
    head = read_head(folder)
    counts = [-(-n // c) for n, c in zip(head["shape"], head["chunks"], strict=True)]
    separator = head.get("dimension_separator", ".")
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
    # Metadata may name more chunks than memory holds: those that exist are counted.
    missing = prod(counts) - sum(_is_chunk(name, counts, separator) for name in present)
    if missing:
        names = (_chunk_name(number, counts, separator) for number in itertools.count())
        first = next(name for name in names if name not in present)
        found = f"without {first}{f' and {missing - 1} more' if missing > 1 else ''}"
        expected = f"an array with all its {prod(counts)} chunks"
        fix = "copy the array again"
        if head.get("fill_value") is not None:
            fix += "; chunks of its fill value may never have been written"
        raise Corrupt(str(folder), found, expected, fix)
    _check_memory(folder, head, (folder / name for name in present))


def _check_memory(folder: Path, head: dict[str, Any], files: Iterable[Path]) -> None:
    """Require that a chunk is not much larger than its file.

    TensorStore allocates a whole chunk before it reads, and ends the process if it cannot.
    """
    largest = max((file.stat().st_size for file in files), default=0)
    size = prod(head["chunks"]) * _WIDEST
    if size > max(_SMALL_CHUNK, _MOST_RATIO * largest):
        expected = f"at most {_MOST_RATIO} times the {largest} bytes of its largest file"
        raise Corrupt(f"bytes of a chunk of {folder}", size, expected)


def _chunk_name(number: int, counts: list[int], separator: str) -> str:
    """Name of the file of a chunk, by its number in C order."""
    places = []
    for count in reversed(counts):
        number, place = divmod(number, count)
        places.append(str(place))
    return separator.join(reversed(places)) or "0"


def _is_chunk(name: str, counts: list[int], separator: str) -> bool:
    """Whether a file is a chunk of an array with these numbers of chunks."""
    places = name.split(separator) if counts else []
    if len(places) != len(counts) or not all(p.isdecimal() and len(p) < 20 for p in places):
        return not counts and name == "0"
    if any(int(place) >= count for place, count in zip(places, counts, strict=True)):
        return False
    return (separator.join(str(int(place)) for place in places) or "0") == name


def read_head(folder: Path) -> dict[str, Any]:
    """The contents of `.zarray`.

    Raises:
        Corrupt: it is missing or damaged.
    """
    file = folder / HEAD
    try:
        head = json_value(read_small(file))
        sizes = [*head["shape"], *head["chunks"]]
        if len(head["shape"]) != len(head["chunks"]) or not all(
            type(size) is int and 0 < size < 1 << 62 for size in sizes
        ):
            raise ValueError("shape and chunks do not agree")
        if len(sizes) > 128 or head.get("dimension_separator", ".") not in (".", "/"):
            raise ValueError("an array of more dimensions, or another separator, than zarr has")
    except FileNotFoundError:
        found = "without .zarray" if folder.is_dir() else "missing"
        raise Corrupt(str(folder), found, "a zarr array", "copy the array again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(str(file), str(error), "the JSON file of a zarr array") from None
    return dict(head)


def _reason(error: Exception, folder: Path) -> str:
    """What TensorStore says, without the spec that it appends; a chunk is named by its file."""
    text = str(error).split("\n", maxsplit=1)[0].split(" [tensorstore_spec", maxsplit=1)[0]
    return text.replace(f"{folder}/", "")


def as_torch(values: Any) -> Tensor:
    """A NumPy array, bfloat16 of `ml_dtypes` included, as a tensor."""
    values = np.ascontiguousarray(values)
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(library("ml_dtypes").bfloat16)
    return tensor.numpy()


def write_array(
    directory: Path, path: str, tensor: LazyTensor, transposed: bool, progress: Progress
) -> dict[str, Any]:
    """Write one array.

    Args:
        directory: directory of the file `checkpoint`.
        path: the parameter below `target`.
        tensor: the logical tensor.
        transposed: whether the array is its transpose.
        progress: called with the bytes written.

    Returns:
        The array's spec for the tree.
    """
    shape = tensor.shape[::-1] if transposed else tensor.shape
    dtype = {kind: name for name, kind in DTYPES.items()}[tensor.dtype]
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
    place_on_disk = str(directory.resolve() / folder)
    here = {
        **spec,
        "kvstore": {"driver": "file", "path": place_on_disk},
        "store_data_equal_to_fill_value": True,
    }
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
