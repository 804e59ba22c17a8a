"""Concatenates indexed datasets, as Megatron-LM's `tools/merge_datasets.py` does.

Files are copied as streams, so memory does not depend on their size. The result appears complete or
not at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.format import (
    HEADER,
    MAGIC,
    TYPES,
    VERSION,
    bounds_position,
    index_size,
    offsets_position,
    paths_of,
    read_chunks,
)
from megatron_moe.data.indexed.manifest import (
    Manifest,
    manifest_path,
    merged,
    read_manifest,
    write_manifest,
)
from megatron_moe.data.progress import Advance, ignore_progress
from megatron_moe.errors import UsageError

_CHUNK = 1 << 20
"""Entries of an index in memory at a time."""
_COPY = 16 << 20
"""Bytes of tokens in memory at a time."""


@dataclass(frozen=True)
class Part:
    """One of the datasets to merge."""

    prefix: str
    code: int
    sequences: int
    documents: int
    bytes: int


def merge(prefixes: Sequence[str], output: str, advance: Advance = ignore_progress) -> list[Part]:
    """Write ``output.bin`` and ``output.idx``, and a manifest if all parts have one.

    Args:
        prefixes: of the parts, in order.
        output: prefix of the result.
        advance: called with the bytes of tokens copied.

    Returns:
        The parts.

    Raises:
        UsageError: a part is damaged, or has another id type or tokenizer than the first, or the
            disk is full. Files at ``output`` are unchanged then.
    """
    if not prefixes:
        raise UsageError("--input", [], "one or more datasets")
    if os.path.realpath(output) in map(os.path.realpath, prefixes):
        raise UsageError("--output-prefix", output, "different from the prefix of every part")
    parts = [_open_part(prefix) for prefix in prefixes]
    for part in parts:
        if part.code != parts[0].code:
            name, first = TYPES[part.code].name, parts[0]
            expected = f"{TYPES[first.code].name}, as in {first.prefix}"
            raise UsageError(f"token type of {part.prefix}", name, expected)
    manifests = [read_manifest(prefix) for prefix in prefixes]
    known = [manifest for manifest in manifests if manifest is not None]
    check_same_origin([p for p, m in zip(prefixes, manifests, strict=True) if m], known)
    try:
        _write(parts, output, advance)
        if len(known) == len(parts):
            write_manifest(output, merged(known))
    except OSError as error:
        raise UsageError(
            "--output-prefix", output, "a writable path with free space", str(error)
        ) from None
    return parts


def check_same_origin(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Reject datasets whose manifests have different tokenizers, vocabularies or ends.

    Raises:
        UsageError: names the dataset that differs from the first, and the field.
    """
    for prefix, manifest in zip(prefixes[1:], manifests[1:], strict=True):
        for name in ("tokenizer_hash", "vocab_size", "append_eod"):
            found, expected = getattr(manifest, name), getattr(manifests[0], name)
            if found != expected:
                words = f"{expected!r}, as in {prefixes[0]}"
                raise UsageError(f"{name} of {prefix}", found, words)


def _open_part(prefix: str) -> Part:
    """Check a part. A part may have no tokens (an empty partition), unlike data to train on."""
    bin_path, idx_path = paths_of(prefix)
    try:
        with open(idx_path, "rb") as index:
            header = index.read(HEADER.size)
        size = os.stat(bin_path).st_size
    except OSError as error:
        expected = "the prefix of a readable pair PREFIX.bin, PREFIX.idx"
        raise UsageError("--input", prefix, expected, str(error)) from None
    if size > 0 or len(header) < HEADER.size:
        source = inspect_source(prefix)
        return Part(prefix, source.type_code, source.sequences, source.documents, size)
    magic, version, code, sequences, ends = HEADER.unpack(header)
    fits = os.stat(idx_path).st_size == index_size(0, ends)
    if (magic, version, sequences) != (MAGIC, VERSION, 0) or not fits:
        raise UsageError(f"size of {bin_path}", 0, f"that of the tokens in {idx_path}")
    return Part(prefix, code, 0, ends - 1, 0)


def _write(parts: Sequence[Part], output: str, advance: Advance) -> None:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    targets = paths_of(output)
    partial = [f"{path}.partial-{os.getpid()}" for path in targets]
    try:
        with ExitStack() as stack:
            tokens, index = (stack.enter_context(open(path, "wb")) for path in partial)
            for part in parts:
                with open(paths_of(part.prefix)[0], "rb") as source:
                    while block := source.read(_COPY):
                        tokens.write(block)
                        advance(len(block))
            _write_index(parts, index)
            for stream in (tokens, index):
                stream.flush()
                os.fsync(stream.fileno())
        # Removed first, so that a process killed between the renames leaves no index of other
        # tokens, and no manifest of other files.
        manifest_path(output).unlink(missing_ok=True)
        Path(targets[1]).unlink(missing_ok=True)
        for source_path, target in zip(partial, targets, strict=True):
            os.replace(source_path, target)
    finally:
        for path in partial:
            Path(path).unlink(missing_ok=True)


def _write_index(parts: Sequence[Part], stream: BinaryIO) -> None:
    sequences = sum(part.sequences for part in parts)
    documents = sum(part.documents for part in parts)
    stream.write(HEADER.pack(MAGIC, VERSION, parts[0].code, sequences, documents + 1))
    for part in parts:
        _copy_entries(part, "<i4", HEADER.size, part.sequences, 0, stream)
    # Offsets and bounds count from the start of a part, so each part adds the sizes before it.
    before = 0
    for part in parts:
        position = offsets_position(part.sequences)
        _copy_entries(part, "<i8", position, part.sequences, before, stream)
        before += part.bytes
    # The first bound of every part is 0. It is written once; of the parts, the bounds after it.
    stream.write(np.zeros(1, "<i8").tobytes())
    before = 0
    for part in parts:
        position = bounds_position(part.sequences) + 8
        _copy_entries(part, "<i8", position, part.documents, before, stream)
        before += part.sequences


def _copy_entries(
    part: Part, dtype: str, position: int, count: int, added: int, stream: BinaryIO
) -> None:
    """Copy entries of a part's index, from byte ``position`` on, with ``added`` added to each."""
    for _, values in read_chunks(paths_of(part.prefix)[1], dtype, position, count, _CHUNK):
        stream.write((values + added).astype(dtype).tobytes())
