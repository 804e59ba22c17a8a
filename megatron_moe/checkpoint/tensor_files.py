"""safetensors files: laid out, written from tensors or from a copy in host memory, read mapped.

They are written here rather than by the `safetensors` package, which needs every tensor on the host
at once, contiguous, and a second read for the hash; this writer holds one part of one tensor at a
time. They are read by the package.

    8 bytes      length of the header, little-endian
    header       JSON, key -> {dtype, shape, data_offsets}; `__metadata__` -> strings
    tensors      row-major, wide dtypes first, without gaps
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.checkpoint.disk import CHUNK, FileRecord, Stream, write_stream
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.files import open_regular

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""Names of dtypes in safetensors."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
"""The inverse of `DTYPES`."""
FORMAT_METADATA = {"format": "pt"}
"""Least metadata of a file: other libraries require the entry."""
_OPEN_FILES = 64
"""Files that one reader keeps open."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written, produced while it is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]
    """Its elements in row-major order, in parts of any size."""

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> TensorSource:
        """A tensor in memory, on any device and in any memory layout."""
        return cls(key, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def write_tensors(
    path: Path, tensors: Sequence[TensorSource], metadata: Mapping[str, str]
) -> FileRecord:
    """Write a safetensors file, one part of one tensor at a time, and sync it to the disk.

    Args:
        path: a file that does not exist.
        tensors: what it holds.
        metadata: strings for its header.

    Raises:
        OSError: the disk is full, or any other failure.
        ValueError: the parts of a tensor do not have its dtype or number of elements.
    """
    return write_stream(path, stream_of(tensors, metadata)())


def stream_of(tensors: Sequence[TensorSource], metadata: Mapping[str, str]) -> Stream:
    """The bytes of a safetensors file, of which one part of one tensor is in memory at a time."""
    header, ordered = lay_out(tensors, metadata)
    return lambda: _file_bytes(header, ordered)


def lay_out(
    tensors: Sequence[TensorSource], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorSource]]:
    """The header of a safetensors file with its length, and the tensors in the file's order."""
    # Wide dtypes first, so that every tensor is aligned to its own width.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.bytes
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.key] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def _file_bytes(header: bytes, tensors: Sequence[TensorSource]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        left = prod(tensor.shape)
        for part in tensor.parts():
            left -= part.numel()
            if part.dtype != tensor.dtype or left < 0:
                raise ValueError(f"{tensor.key}: a part is {part.dtype}, {left} elements are left")
            for piece in _pieces(part.detach()):
                yield memoryview(bytes_of(piece))
        if left:
            raise ValueError(f"{tensor.key}: {left} elements are missing")


def bytes_of(tensor: Tensor) -> Any:
    """The elements in row-major order as a NumPy array of bytes; shares memory if it can."""
    flat = tensor.cpu().contiguous().view(-1)
    # A single element counts as contiguous with any stride, but is no bytes with that.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in row-major order, cut into pieces of about a chunk if it has to be copied."""
    # Copies of a few MB reuse the same memory; a copy of a whole tensor needs new pages.
    size = tensor.numel() * tensor.element_size()
    if size <= CHUNK or (tensor.is_contiguous() and not tensor.is_cuda):
        yield tensor
        return
    rows = max(CHUNK * tensor.shape[0] // size, 1)
    for part in tensor.split(rows):
        if len(part) == 1:
            yield from _pieces(part[0])
        else:
            yield part


@dataclass(frozen=True)
class HostCopy:
    """A safetensors file in host memory; valid until `HostMemory` takes the next copy."""

    header: bytes
    data: memoryview
    """The tensors' bytes."""

    def parts(self) -> Iterator[memoryview]:
        """The bytes of the file."""
        yield memoryview(self.header)
        yield self.data


class HostMemory:
    """Memory for one copy of a rank's state, laid out as its files; kept from save to save.

    It is the one extra copy that an asynchronous save needs. It is kept because writing to pages
    that exist is more than twice as fast as writing to new ones.

    Args:
        pinned: page-locked, so that a GPU copies into it at full speed.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.step: int | None = None
        """The step whose copy is still being written, set by the save in progress."""

    def copy(
        self, files: Sequence[tuple[Sequence[TensorSource], Mapping[str, str]]]
    ) -> list[HostCopy]:
        """Copy tensors; they may change once this returns.

        Args:
            files: for each file its tensors, each in a single part, and its metadata.

        Raises:
            CheckpointError: there is not enough memory.
        """
        layouts = [lay_out(tensors, metadata) for tensors, metadata in files]
        starts = list(accumulate((_padded_bytes(tensors) for _, tensors in layouts), initial=0))
        if starts[-1] > self._bytes.numel():
            # Free the old memory first, so that old and new are never held together.
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._bytes = self._allocate(starts[-1])
        copies, on_gpu = [], False
        for start, (header, tensors) in zip(starts, layouts, strict=False):
            stop = self._copy_in(tensors, start)
            raw: Any = self._bytes[start:stop].numpy()
            copies.append(HostCopy(header, memoryview(raw)))
            on_gpu = on_gpu or any(part.is_cuda for tensor in tensors for part in tensor.parts())
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy_in(self, tensors: Sequence[TensorSource], start: int) -> int:
        """Copy the tensors of one file to offset ``start``; returns the offset of its end."""
        for tensor in tensors:
            (source,) = tensor.parts()
            stop = start + tensor.bytes
            # Wide dtypes come first, so every start is a multiple of the width.
            target = self._bytes[start:stop].view(tensor.dtype).view(tensor.shape)
            target.copy_(source.detach(), non_blocking=True)
            start = stop
        return start

    def _allocate(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:
            expected = f">= {size} bytes, for one copy of this rank's state"
            fix = "save without --async-save, or from more ranks"
            what = "free host memory for --async-save"
            raise CheckpointError(what, "a failed allocation", expected, fix) from None


def _padded_bytes(tensors: Sequence[TensorSource]) -> int:
    """Bytes of a file's tensors, rounded up so that the next file starts at a multiple of 16."""
    size = sum(tensor.bytes for tensor in tensors)
    return size + -size % 16


class TensorFiles:
    """The safetensors files of a directory, mapped: only pages that are accessed are read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}

    def tensor(self, file: str, key: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """One tensor, as a view of the mapped file.

        Raises:
            Corrupt: the file does not hold it with this dtype and shape.
        """
        try:
            handle = self._handle(file)
            part = handle.get_slice(key)
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found == (dtype, tuple(shape)):
                return handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            expected = f"a safetensors file with {key}"
            raise Corrupt(str(self.directory / file), f"{error}", expected) from None
        raise Corrupt(f"{key} in {self.directory / file}", found, f"{dtype} of shape {shape}")

    def metadata(self, file: str) -> dict[str, str]:
        """The strings in a file's header.

        Raises:
            Corrupt: it is not a safetensors file.
        """
        try:
            return self._handle(file).metadata() or {}
        except (SafetensorError, OSError) as error:
            raise Corrupt(str(self.directory / file), f"{error}", "a safetensors file") from None

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            open_regular(self.directory / file).close()  # a named pipe would block
            self._open[file] = safe_open(str(self.directory / file), framework="pt")
        return self._open[file]
