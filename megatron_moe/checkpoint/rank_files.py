"""How what one rank saves is divided among files.

The SHA-256 of a file is one sequence that a single core computes, more slowly than a good disk
writes. Several files of one rank are hashed side by side, when they are written and when they are
loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.files import DTYPES, Pending, pending
from megatron_moe.checkpoint.index import LogicalTensor, block_key
from megatron_moe.model.sharding.blocks import Part

FILE_BYTES = 96 << 20
"""Bytes of tensors that are worth a file of their own."""
MOST_FILES = 8
"""Of one rank: a thousand ranks must not burden a shared file system with many more."""

RankFile = tuple[str, Sequence[Part]]
"""The name of a file and what it holds."""


def rank_file(rank: int, number: int = 0) -> str:
    """The name of a rank's first file, which has its random states, or of a further one."""
    return f"rank-{rank:05d}" + (f"-{number}" if number else "") + ".safetensors"


def divided(parts: Iterable[Part], rank: int) -> list[RankFile]:
    """A rank's parts in files of about the same size; at least one, even if it is empty.

    The largest part goes first, each to the file with the least so far; parts are never cut.
    """
    sized = sorted(parts, key=lambda part: -_bytes(part))
    count = sum(map(_bytes, sized)) // max(FILE_BYTES, 1)
    files: list[list[Part]] = [[] for _ in range(min(max(count, 1), MOST_FILES))]
    filled = [0] * len(files)
    for part in sized:
        least = filled.index(min(filled))
        files[least].append(part)
        filled[least] += _bytes(part)
    return [
        (rank_file(rank, number), held) for number, held in enumerate(files) if held or not number
    ]


def _bytes(part: Part) -> int:
    return part.values.numel() * part.values.element_size()


def tensors_of(parts: Iterable[Part]) -> list[Pending]:
    """What a file holds."""
    return [pending(block_key(p.kind, p.name, p.block.offsets), p.values) for p in parts]


def index_of(files: Iterable[RankFile]) -> dict[str, Any]:
    """The index of one rank's files."""
    grouped: dict[index.Name, LogicalTensor] = {}
    for file, part in _each(files):
        known = grouped.get((part.kind, part.name))
        blocks = (*(known.blocks if known else ()), (file, part.block))
        dtype = DTYPES[part.values.dtype]
        grouped[part.kind, part.name] = LogicalTensor(
            part.kind, part.name, part.shape, dtype, part.block.view, blocks
        )
    return index.to_json(grouped.values())


def _each(files: Iterable[RankFile]) -> Iterator[tuple[str, Part]]:
    for file, parts in files:
        for part in parts:
            yield file, part
