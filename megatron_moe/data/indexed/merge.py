"""Puts indexed data sets one after the other, as Megatron-LM's `tools/merge_datasets.py` does.

Files are copied as streams: memory does not depend on their size. The result appears whole or not
at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.format import HEADER, MAGIC, TYPES, VERSION, paths_of
from megatron_moe.data.indexed.manifest import (
    Manifest,
    manifest_path,
    merged,
    read_manifest,
    write_manifest,
)
from megatron_moe.data.preprocess.progress import Advance, nobody
from megatron_moe.errors import UsageError

_CHUNK = 1 << 20
"""Entries of an index that are held at once."""
_COPY = 16 << 20
"""Bytes of tokens that are held at once."""


@dataclass(frozen=True)
class Part:
    """One of the data sets."""

    prefix: str
    code: int
    sequences: int
    documents: int
    bytes: int


def merge(prefixes: Sequence[str], output: str, advance: Advance = nobody) -> list[Part]:
    """Write ``output.bin`` and ``output.idx``, and a manifest if all parts have one.

    Args:
        prefixes: of the parts, in order.
        output: prefix of the result.
        advance: is told the bytes of tokens that were copied.

    Returns:
        The parts, as they were found.

    Raises:
        UsageError: a part is damaged, or is of another type of ids or tokenizer than the first; the
            disk is full. Whatever was at ``output`` is as it was then.
    """
    if not prefixes:
        raise UsageError("--input", [], "at least one data set")
    if os.path.realpath(output) in map(os.path.realpath, prefixes):
        raise UsageError("--output-prefix", output, "another place than the parts'")
    parts = [_look_at(prefix) for prefix in prefixes]
    for part in parts:
        if part.code != parts[0].code:
            name, first = TYPES[part.code].name, parts[0]
            expected = f"{TYPES[first.code].name}, as in {first.prefix}"
            raise UsageError(f"token type of {part.prefix}", name, expected)
    manifests = [read_manifest(prefix) for prefix in prefixes]
    known = [manifest for manifest in manifests if manifest is not None]
    refuse_mixture([p for p, m in zip(prefixes, manifests, strict=True) if m], known)
    try:
        _write(parts, output, advance)
        if len(known) == len(parts):
            write_manifest(output, merged(known))
    except OSError as error:
        raise UsageError("--output-prefix", output, "a place with room", str(error)) from None
    return parts


def refuse_mixture(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Refuse data sets that were not made alike, as far as their manifests tell.

    Raises:
        UsageError: names the one that differs from the first, and in what.
    """
    for prefix, manifest in zip(prefixes[1:], manifests[1:], strict=True):
        for name in ("tokenizer_hash", "vocab_size", "append_eod"):
            found, expected = getattr(manifest, name), getattr(manifests[0], name)
            if found != expected:
                words = f"{expected!r}, as in {prefixes[0]}"
                raise UsageError(f"{name} of {prefix}", found, words)


def _look_at(prefix: str) -> Part:
    """Check a part. One without tokens is allowed here, though nothing can be trained on it."""
    bin_path, idx_path = paths_of(prefix)
    try:
        with open(idx_path, "rb") as index:
            header = index.read(HEADER.size)
        size = os.stat(bin_path).st_size
    except OSError as error:
        raise UsageError("--input", prefix, "a pair PREFIX.bin, PREFIX.idx", str(error)) from None
    if size > 0 or len(header) < HEADER.size:
        source = inspect_source(prefix)
        return Part(prefix, source.type_code, source.sequences, source.documents, size)
    magic, version, code, sequences, ends = HEADER.unpack(header)
    expected = HEADER.size + 8 * ends
    if (magic, version, sequences) != (MAGIC, VERSION, 0) or os.stat(idx_path).st_size != expected:
        raise UsageError(f"size of {bin_path}", 0, f"the tokens that {idx_path} describes")
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
        # An index is only ever beside the tokens it was written for, and a manifest beside both.
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
        for lengths in _entries(part, "<i4", 0, part.sequences):
            stream.write(lengths.tobytes())
    before = 0
    for part in parts:
        for offsets in _entries(part, "<i8", 4 * part.sequences, part.sequences):
            stream.write((offsets + before).astype("<i8").tobytes())
        before += part.bytes
    stream.write(np.zeros(1, "<i8").tobytes())
    before = 0
    for part in parts:
        for ends in _entries(part, "<i8", 12 * part.sequences + 8, part.documents):
            stream.write((ends + before).astype("<i8").tobytes())
        before += part.sequences


def _entries(part: Part, kind: str, offset: int, count: int) -> Iterator[npt.NDArray[np.integer]]:
    """Entries of a part's index, ``offset`` bytes behind its header, in pieces."""
    size = np.dtype(kind).itemsize
    for first in range(0, count, _CHUNK):
        start = HEADER.size + offset + size * first
        yield np.fromfile(paths_of(part.prefix)[1], kind, min(_CHUNK, count - first), offset=start)
