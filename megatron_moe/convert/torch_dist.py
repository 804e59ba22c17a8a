"""Files of a Megatron-Core distributed checkpoint (`torch_dist`), read without executing pickles.

    metadata.json   which format: {"sharded_backend": "torch_dist", ...}
    .metadata       a pickle: for each tensor its shape, and its chunks with file, offset and length
    __R_N.distcp    chunks one after the other, each what `torch.save` writes for a tensor: a zip
                    with a small pickle and the raw numbers
    common.pt       one `torch.save` of what is no tensor: `args`, `iteration`, ...

The format is that of `torch.distributed.checkpoint`. Pickles are read as data (`pickled.py`), and
numbers are mapped from the files, after the zip's CRC-32 of a chunk was compared once.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_moe.convert.pickled import Built, Name, Persistent, attributes, describe, read_pickle
from megatron_moe.errors import Corrupt
from megatron_moe.files import is_file_name, open_regular, read_small

METADATA, COMMON = ".metadata", "common.pt"
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
_LOCAL_HEADER = 30
"""Bytes of a zip's local header before the name; lengths of name and extra field end it."""
_READ = 16 << 20
_DIMENSIONS = 64
"""Most dimensions of a tensor in PyTorch."""
_ELEMENTS = 1 << 62
"""Upper bound of the elements of a tensor, which 64 bits can count."""
_DAMAGE = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError),
)
"""What damaged zip files and pickles raise: RuntimeError for encryption and unknown compression."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and the part of a file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, whole, in any number of chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    checked: set[Chunk] = field(default_factory=set, compare=False, repr=False)
    """Chunks whose CRC-32 was compared."""

    def read(self, region: Sequence[tuple[int, int]]) -> Tensor:
        """A region, given as a range for each of the first dimensions; the others are whole.

        Raises:
            Corrupt: a chunk is damaged.
        """
        ranges = [*region, *((0, size) for size in self.shape[len(region) :])]
        out = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype)
        for chunk in self.chunks:
            theirs, ours = [], []
            for (start, stop), offset, size in zip(ranges, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(start, offset), min(stop, offset + size)
                theirs.append(slice(first - offset, last - offset))
                ours.append(slice(first - start, last - start))
            if all(part.start < part.stop for part in ours):
                out[tuple(ours)] = self._values(chunk)[tuple(theirs)]
        return out

    def _values(self, chunk: Chunk) -> Tensor:
        where = f"{self.name} in {chunk.file}"
        values = read_tensor(
            chunk.file, chunk.start, chunk.length, where, chunk not in self.checked
        )
        if values.dtype != self.dtype or values.numel() != prod(chunk.sizes):
            found = f"{values.dtype} {list(values.shape)}"
            raise Corrupt(where, found, f"{self.dtype} {list(chunk.sizes)}")
        self.checked.add(chunk)
        return values.reshape(chunk.sizes)


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name, optimizer state included. No tensor is read.

    Raises:
        Corrupt: `.metadata` is missing or damaged, or a file is missing or too short.
    """
    source = folder / METADATA
    try:
        content = read_pickle(read_small(source), str(source))
    except FileNotFoundError:
        found = f"without {METADATA}, as copied with `cp {folder.name}/*`"
        raise Corrupt(str(folder), found, "a whole checkpoint", f"copy {METADATA} too") from None
    except OSError as error:
        raise Corrupt(str(source), str(error), "a readable file") from None
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    try:
        metadata = attributes(content, "Metadata")
        places = _places(folder, metadata["storage_data"])
        tensors = {
            name: _stored(_text(name), attributes(entry, "TensorStorageMetadata"), places)
            for name, entry in metadata["state_dict_metadata"].items()
            if describe(entry).endswith(".TensorStorageMetadata")
        }
    except _DAMAGE as error:
        expected = "metadata of torch.distributed.checkpoint"
        raise Corrupt(str(source), _reason(error), expected) from None
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            size = sizes.get(chunk.file.name)
            if size is None or size < chunk.start + chunk.length:
                found = "missing" if size is None else f"{size} bytes"
                raise Corrupt(str(chunk.file), found, f">= {chunk.start + chunk.length} bytes")
    return tensors


def _places(folder: Path, storage: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], Chunk]:
    """Where the chunk of a tensor with these offsets lies; its sizes are not known here."""
    places = {}
    for key, value in storage.items():
        index, info = attributes(key, "MetadataIndex"), attributes(value, "_StorageInfo")
        if index.get("offset") is None:
            continue  # no tensor
        if info.get("transform_descriptors"):
            by = describe(info["transform_descriptors"])
            raise ValueError(f"{describe(index['fqn'])} compressed by {by}")
        file, name = _text(info["relative_path"]), _text(index["fqn"])
        if not is_file_name(file):
            raise ValueError(f"the file {describe(file)}")
        offsets, (start, length) = _size(index["offset"]), _size((info["offset"], info["length"]))
        places[name, offsets] = Chunk(offsets, (), folder / file, start, length)
    return places


def _stored(
    name: str, entry: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...]], Chunk]
) -> StoredTensor:
    shape, chunks = _size(entry["size"]), []
    for part in entry["chunks"]:
        found = attributes(part, "ChunkStorageMetadata")
        offsets, sizes = _size(found["offsets"]), _size(found["sizes"])
        place = places[name, offsets]
        chunks.append(Chunk(offsets, sizes, place.file, place.start, place.length))
    _check_cover(name, shape, chunks)
    return StoredTensor(name, shape, _dtype(entry["properties"]), tuple(chunks))


def _check_cover(name: str, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> None:
    """Require that every element of a tensor lies in exactly one chunk.

    Chunks within the tensor that do not overlap and have as many elements as it cover it.

    Raises:
        ValueError: a chunk reaches beyond the tensor, two overlap, or elements are missing.
    """
    if prod(shape) > _ELEMENTS or max(shape, default=0) > _ELEMENTS:
        raise ValueError(f"{name} of the shape {describe(shape)}")
    for chunk in chunks:
        ranks = {len(shape), len(chunk.offsets), len(chunk.sizes)}
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        if len(ranks) > 1 or any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"{name} {list(shape)} with a chunk {_extent(chunk)}")
    filled = [chunk for chunk in chunks if prod(chunk.sizes)]
    stored = sum(prod(chunk.sizes) for chunk in filled)
    if stored != prod(shape):
        raise ValueError(f"{name} with {stored} of {prod(shape)} elements")
    overlap = None if _is_grid(shape, filled) else _overlap(filled)
    if overlap is not None:
        one, other = map(_extent, overlap)
        raise ValueError(f"{name} with chunks that overlap, {one} and {other}")


def _extent(chunk: Chunk) -> str:
    """Its range in each dimension, `[0:4, 0:8]`."""
    ends = (f"{o}:{o + n}" for o, n in zip(chunk.offsets, chunk.sizes, strict=False))
    return f"[{', '.join(ends)}]"


def _is_grid(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> bool:
    """Whether the chunks are different cells of a grid, which is quick to see for thousands."""
    if len({chunk.offsets for chunk in chunks}) < len(chunks):
        return False
    for dimension, size in enumerate(shape):
        starts = sorted({chunk.offsets[dimension] for chunk in chunks})
        ends = dict(zip(starts, [*starts[1:], size], strict=False))
        for chunk in chunks:
            start = chunk.offsets[dimension]
            if start + chunk.sizes[dimension] != ends[start]:
                return False
    return True


def _overlap(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks with a common element, if there are; each is compared with those after it."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    first = np.array([chunk.offsets for chunk in ordered], np.int64)
    last = first + np.array([chunk.sizes for chunk in ordered], np.int64)
    if not first.shape[1]:  # numbers without dimensions
        return (ordered[0], ordered[1]) if len(ordered) > 1 else None
    for place, chunk in enumerate(ordered):
        near = slice(place + 1, np.searchsorted(first[:, 0], last[place, 0]))
        common = (first[near] < last[place]) & (first[place] < last[near])
        if common.all(axis=1).any():
            return chunk, ordered[place + 1 + int(common.all(axis=1).argmax())]
    return None


def _text(value: Any) -> str:
    """A name of a tensor or a file."""
    if not isinstance(value, str):
        raise ValueError(f"{describe(value)} in place of a name")
    return value


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _size(value: Any) -> tuple[int, ...]:
    """`torch.Size((2, 3))`."""
    named = isinstance(value, Built) and value.of == Name("torch", "Size")
    sizes = value.args[0] if named else value
    plain = isinstance(sizes, tuple) and len(sizes) <= _DIMENSIONS
    if not plain or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"{describe(value)} in place of a shape")
    return sizes


def _dtype(properties: Any) -> torch.dtype:
    """The dtype of `TensorProperties`, the first of its values."""
    state = properties.state if isinstance(properties, Built) else None
    named = state[0] if isinstance(state, tuple) and state else None
    found = getattr(torch, named.name, None) if isinstance(named, Name) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the dtype {describe(named)}")
    return found


def read_saved(file: Path) -> Any:
    """What `torch.save` wrote, as the data of `pickled.read_pickle`; tensors stay references.

    Raises:
        Corrupt: the file is missing, damaged, or in the format before PyTorch 1.6.
    """
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            size = stream.seek(0, io.SEEK_END)
            return read_pickle(_record(archive, _info(archive, "data.pkl"), size), str(file))
    except Corrupt:
        raise
    except _DAMAGE as error:
        raise Corrupt(str(file), _reason(error), "a zip file of torch.save") from None


def read_tensor(file: Path, start: int, length: int, where: str, check: bool) -> Tensor:
    """A tensor that `torch.save` wrote into a part of a file; its numbers are mapped, not copied.

    Args:
        file: the file.
        start: first byte.
        length: number of bytes.
        where: the tensor, for messages.
        check: compare the CRC-32 of the numbers.

    Raises:
        Corrupt: it is damaged, or is no plain tensor; what it is instead is named.
    """
    try:
        with open_regular(file) as stream:
            window = io.BufferedReader(_Window(stream, start, length))
            with zipfile.ZipFile(window) as archive:
                key, dtype, offset, size, stride = _view(
                    read_pickle(_record(archive, _info(archive, "data.pkl"), length), where)
                )
                order = next((n for n in archive.namelist() if n.endswith("/byteorder")), None)
                if order is not None:
                    found = _record(archive, archive.getinfo(order), length)
                    if found != b"little":
                        raise ValueError(f"the byte order {describe(found)}")
                info = _info(archive, f"data/{key}")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("compressed numbers")
                if check:
                    with archive.open(info) as record:
                        while record.read(_READ):  # compares the CRC-32 at its end
                            pass
            window.seek(info.header_offset)
            header = window.read(_LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<HH", header[-4:])
        first = start + info.header_offset + _LOCAL_HEADER + name_length + extra_length
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
        if prod(size) and last * dtype.itemsize > info.file_size:
            raise ValueError(f"{info.file_size} bytes for {list(size)} elements")
        # Copy on write, since PyTorch warns of memory that cannot be written to; none is.
        raw = np.memmap(file, np.uint8, "c", first, (info.file_size,))
        return torch.from_numpy(raw).view(dtype).as_strided(size, stride, offset)
    except Corrupt:
        raise
    except _DAMAGE as error:
        raise Corrupt(where, _reason(error), "a tensor of torch.save") from None


def _view(value: Any) -> tuple[str, torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """Key of the storage, dtype, first element, shape and strides of a pickled tensor."""
    if isinstance(value, Built) and value.of == Name("torch._utils", "_rebuild_parameter"):
        value = value.args[0]
    if not isinstance(value, Built) or value.of != Name("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError(describe(value))
    storage, offset, size, stride = value.args[:4]
    if not isinstance(storage, Persistent) or not isinstance(storage.id, tuple):
        raise ValueError(f"a tensor of {describe(storage)}")
    _, kind, key = storage.id[:3]
    if not isinstance(kind, Name) or kind.name not in _STORAGES:
        raise ValueError(f"numbers of {describe(kind)}")
    sizes, strides = _size(size), _size(stride)
    if type(offset) is not int or offset < 0 or len(sizes) != len(strides):
        raise ValueError("shape and strides that do not agree")
    return _text(key), _STORAGES[kind.name], offset, sizes, strides


def _info(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A record; all of them are in one folder, whose name varies."""
    folder = archive.namelist()[0].partition("/")[0]
    return archive.getinfo(f"{folder}/{name}")


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """The contents of a record, of at most the bytes of the file: PyTorch compresses nothing."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
        found = f"{info.file_size} bytes, {info.compress_size} compressed, in a file of {most}"
        raise ValueError(f"{describe(info.filename)} with {found}")
    return archive.read(info)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self.stream, self.start, self.length, self.place = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self.place, 2: self.length}[whence]
        if base + offset < 0:
            raise OSError("a place before the file")
        self.place = base + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.stream.seek(self.start + self.place)
        view = memoryview(buffer)
        data = self.stream.read(max(0, min(len(view), self.length - self.place)))
        view[: len(data)] = data
        self.place += len(data)
        return len(data)
