"""Single files of a checkpoint: written once, synced, and hashed on the way to the disk.

Tensor files are safetensors. They are written here rather than by the `safetensors` package because
that wants every tensor on the host at once, contiguous, and the file read again for its hash; this
writer holds one tensor at a time. Reading is the package's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.stream import CHUNK, FileRecord, Stream, hash_of, write_stream
from megatron_moe.errors import CheckpointError, Corrupt

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
PLAIN_HEAD = {"format": "pt"}
"""What the head of a file says at least: readers of other libraries ask for it."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
"""The inverse of `DTYPES`."""


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> FileRecord:
    """Write a safetensors file and sync it to the disk.

    Args:
        path: a file that does not exist.
        tensors: keys and tensors, on any device and in any memory layout.
        metadata: strings for the header.

    Raises:
        OSError: the disk is full, or anything else.
    """
    return write_pending(path, [pending(key, tensor) for key, tensor in tensors], metadata)


@dataclass(frozen=True)
class Pending:
    """A tensor to be written, made while it is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]
    """Its elements in row-major order, cut anywhere."""

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * self.dtype.itemsize


def pending(key: str, tensor: Tensor) -> Pending:
    """A tensor that is there already."""
    return Pending(key, tensor.dtype, tuple(tensor.shape), lambda: iter([tensor]))


def write_pending(
    path: Path, tensors: Sequence[Pending], metadata: Mapping[str, str]
) -> FileRecord:
    """`write_tensors`, holding one part of one tensor at a time.

    Raises:
        OSError: the disk is full, or anything else.
        ValueError: the parts of a tensor are not what it was said to be.
    """
    return write_stream(path, stream_of(tensors, metadata)())


def stream_of(tensors: Sequence[Pending], metadata: Mapping[str, str]) -> Stream:
    """The bytes of a safetensors file, of which one part of one tensor is held at a time."""
    head, ordered = arranged(tensors, metadata)
    return lambda: _tensor_bytes(head, ordered)


def arranged(
    tensors: Sequence[Pending], metadata: Mapping[str, str]
) -> tuple[bytes, list[Pending]]:
    """The head of a safetensors file, and the tensors in the order in which they follow it.

    Wide types first: that keeps every tensor aligned to its own width.
    """
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


def _tensor_bytes(head: bytes, tensors: Sequence[Pending]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        left = prod(tensor.shape)
        for part in tensor.parts():
            left -= part.numel()
            if part.dtype != tensor.dtype or left < 0:
                raise ValueError(f"{tensor.key}: a part is {part.dtype}, {left} elements are left")
            for piece in _pieces(part.detach()):
                raw: Any = piece.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                yield memoryview(raw)
        if left:
            raise ValueError(f"{tensor.key}: {left} elements are missing")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in its order, cut into what is copied at a time if it must be copied.

    Copies of a few MB use the same memory again and again; one of a whole tensor takes new pages.
    """
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


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file and sync it to the disk.

    Raises:
        OSError: the disk is full, or anything else.
        CheckpointError: the value is not plain JSON; NaN and infinity are not.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(path.name, str(error), "values that JSON can hold") from None
    return write_stream(path, iter([memoryview(text.encode())]))


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Give a small file new contents in one step: readers see the old or the new.

    Raises:
        OSError: the disk is full, or anything else; the old contents stay.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        write_stream(temporary, iter([memoryview(text.encode())]))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def check_file(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, in one line that names it; None if it is what was written."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path} has {size} bytes, expected {record.bytes}"
        with path.open("rb") as file:
            digest = hash_of(file)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if digest != record.sha256:
        return f"{path} has SHA-256 {digest[:16]}..., expected {record.sha256[:16]}..."
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        Corrupt: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Corrupt(str(path), "missing", "a file of the checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Corrupt(str(path), str(error), "readable JSON") from None
    if not isinstance(value, dict):
        raise Corrupt(str(path), type(value).__name__, "a JSON object")
    return value


def free_bytes(directory: Path) -> int:
    """Space left where a directory is, in bytes."""
    return shutil.disk_usage(directory).free
