"""Reads stretches of text files as a stream of bounded batches, which workers take apart.

Plain JSON Lines travel as a range of bytes that the worker reads itself; what has to be unpacked
first travels as content. A batch knows how to name its documents when one of them is refused.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.data.preprocess.sources import Stretch, TextDocuments, lines_before
from megatron_moe.errors import UsageError

BATCH = 1 << 19
"""Bytes of text in a batch; one document more than fits is taken whole."""
LARGEST_TEXT = 1 << 28
"""Bytes of a text file that is one document."""
_ROWS = 64
"""Parquet rows that are read at once."""


class Batch(ABC):
    """Some consecutive documents of one file."""

    path: str
    taken: int
    """Bytes of the file, as it lies on the disk, that this batch stands for."""

    @abstractmethod
    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """For each document the texts of each key, in UTF-8.

        Raises:
            UsageError: a document has no such texts; `place` then says where.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """In words, where the document is that `documents` gave after ``index`` others, or was
        about to give.
        """


@dataclass(frozen=True)
class Lines(Batch):
    """JSON Lines that were unpacked."""

    path: str
    taken: int
    first: int
    """Number of the first line, counted from 1."""
    content: tuple[bytes, ...]

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """The texts of each line that is not blank."""
        for line in self.content:
            if not line.isspace():
                yield texts_of(line, keys)

    def place(self, index: int) -> str:
        """The number of the line."""
        full = [number for number, line in enumerate(self.content) if not line.isspace()]
        return f"line {self.first + full[index]} of {self.path}"


@dataclass(frozen=True)
class Range(Batch):
    """JSON Lines to be read by whoever takes them apart."""

    path: str
    taken: int
    start: int

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """The texts of each line that is not blank."""
        return self._lines(0).documents(keys)

    def place(self, index: int) -> str:
        """The number of the line."""
        return self._lines(lines_before(self.path, self.start) + 1).place(index)

    def _lines(self, first: int) -> Lines:
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            content = stream.read(self.taken)
        return Lines(self.path, self.taken, first, tuple(io.BytesIO(content)))


@dataclass(frozen=True)
class Texts(Batch):
    """Documents that are only text."""

    path: str
    taken: int
    where: tuple[str, ...]
    """Where in the file each is, in words."""
    content: tuple[bytes, ...]

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """The one text of each; there is one key."""
        for text in self.content:
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise UsageError("text", text[error.start :][:8], "UTF-8", str(error)) from None
            yield [[text]]

    def place(self, index: int) -> str:
        """The lines, or the file."""
        return f"{self.where[index]}{self.path}"


@dataclass(frozen=True)
class Rows(Batch):
    """Rows of a Parquet file."""

    path: str
    taken: int
    first: int
    """Number of the first row, counted from 0."""
    columns: tuple[tuple[Any, ...], ...]
    """One for each key."""

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """The texts of each row."""
        for row in zip(*self.columns, strict=True):
            yield [as_texts(value, key, row) for value, key in zip(row, keys, strict=True)]

    def place(self, index: int) -> str:
        """The number of the row."""
        return f"row {self.first + index} of {self.path}"


def texts_of(line: bytes, keys: Sequence[str]) -> list[list[bytes]]:
    """The texts of each key in a JSON object.

    Raises:
        UsageError: it is no JSON, no object, or has no text there.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed JSON, or not UTF-8
        start = line[:60].decode("utf-8", errors="replace")
        raise UsageError("JSON", start, "an object", str(error)) from None
    values = record if isinstance(record, dict) else {}
    return [as_texts(values.get(key), key, line) for key in keys]


def as_texts(value: object, key: str, record: object) -> list[bytes]:
    """A text, or a list of texts, in UTF-8."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        shown = record[:60].decode("utf-8", "replace") if isinstance(record, bytes) else value
        raise UsageError(f"--json-keys {key}", shown, f"an object with a text in {key!r}")
    try:
        return [str(text).encode() for text in texts]
    except UnicodeEncodeError as error:
        expected = "text that UTF-8 can write"
        raise UsageError(f"--json-keys {key}", ascii(error.object[error.start]), expected) from None


def read_batches(stretch: Stretch, keys: Sequence[str], text: TextDocuments) -> Iterator[Batch]:
    """The documents of a stretch, in order.

    Raises:
        UsageError: the file cannot be read, is cut off, damaged or of another kind than its suffix
            says, or a library that reads it is not installed.
    """
    path, kind = stretch.file.path, stretch.file.kind
    try:
        if kind == "lines":
            yield from _ranges(stretch)
        elif kind == "text":
            yield from _whole_text(path) if text == "file" else _blocks(path)
        elif kind == "parquet":
            yield from _rows(stretch, keys)
        else:
            yield from _unpacked(path, kind)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError("--input", path, f"a readable {kind} file", str(error)) from None


def _ranges(stretch: Stretch) -> Iterator[Batch]:
    start = stretch.start
    with open(stretch.file.path, "rb") as stream:
        while start < stretch.end:
            end = min(start + BATCH, stretch.end)
            if end < stretch.end:
                stream.seek(end - 1)
                stream.readline()
                end = stream.tell()
            yield Range(stretch.file.path, end - start, start)
            start = end


def _unpacked(path: str, kind: str) -> Iterator[Batch]:
    with open(path, "rb") as raw:
        stream: io.BufferedIOBase
        if kind == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        else:
            from megatron_moe.data.preprocess.zstd import ZstdReader

            stream = io.BufferedReader(ZstdReader(raw), BATCH)
        first, before = 1, 0
        while content := stream.readlines(BATCH):
            yield Lines(path, raw.tell() - before, first, tuple(content))
            before, first = raw.tell(), first + len(content)


def _whole_text(path: str) -> Iterator[Batch]:
    with open(path, "rb") as stream:
        content = stream.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        expected = f"at most {LARGEST_TEXT} bytes in a text file that is one document"
        fix = "--text-documents block takes its blocks between blank lines as documents"
        raise UsageError("--input", path, expected, fix)
    if content:
        yield Texts(path, len(content), ("",), (content,))


def _blocks(path: str) -> Iterator[Batch]:
    """Documents are what stands between blank lines."""
    where: list[str] = []
    blocks: list[bytes] = []
    lines: list[bytes] = []
    taken = held = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            taken += len(line)
            if line.strip():
                lines.append(line)
                continue
            if lines:
                where.append(f"the block before line {number} of ")
                blocks.append(b"".join(lines))
                held, lines = held + len(blocks[-1]), []
            if held > BATCH:
                yield Texts(path, taken, tuple(where), tuple(blocks))
                where, blocks, taken, held = [], [], 0, 0
    if lines:
        where.append("the last block of ")
        blocks.append(b"".join(lines))
    if taken:
        yield Texts(path, taken, tuple(where), tuple(blocks))


def _rows(stretch: Stretch, keys: Sequence[str]) -> Iterator[Batch]:
    path = stretch.file.path
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fix = "pip install 'megatron-moe[data]', or pip install pyarrow"
        raise UsageError("--input", path, "pyarrow installed, to read Parquet", fix) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names, first = file.schema_arrow.names, 0
            for key in keys:
                if key not in names:
                    expected = f"a column of {path}, which has {', '.join(names)}"
                    raise UsageError("--json-keys", key, expected)
            for batch in file.iter_batches(_ROWS, columns=list(dict.fromkeys(keys))):
                columns = tuple(tuple(batch.column(key).to_pylist()) for key in keys)
                rows = first + batch.num_rows
                bounds = [stretch.file.size * i // file.metadata.num_rows for i in (first, rows)]
                yield Rows(path, bounds[1] - bounds[0], first, columns)
                first = rows
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UsageError("--input", path, "a readable Parquet file", reason) from None
