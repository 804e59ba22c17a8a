"""Reads slices of text files as a stream of bounded batches of documents, decoded by workers.

Plain JSON Lines are sent to a worker as a byte range, which it reads itself, so the main process
never touches the text. Formats that have to be decompressed or parsed as a stream are sent as
content. A batch can name the place of each of its documents, for errors.
"""

from __future__ import annotations

import gzip
import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.data.preprocess.inputs import FileSlice, TextDocuments, lines_before
from megatron_moe.errors import UsageError
from megatron_moe.text import (
    BOM,
    LONGEST_RECORD,
    bounded_lines,
    check_unicode,
    decode,
    is_blank,
    json_of_line,
    keys_of,
    shown,
    too_long,
    without_bom,
)

BATCH = 1 << 19
"""Bytes of text in a batch; the document that exceeds it is included completely."""
LARGEST_TEXT = 1 << 28
"""Largest size in bytes of a text file that is one document."""
_LONGER = "--max-record-bytes accepts longer records, for that much more memory"
_PARQUET_ROWS = 64
"""Parquet rows that are read at a time."""


class DocumentBatch(ABC):
    """Consecutive documents of one file."""

    path: str
    taken: int
    """Bytes of the file on disk that the batch was made from, for the progress bar."""

    @abstractmethod
    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """Yield for each document the texts of each key, in UTF-8.

        Raises:
            UsageError: a document has no such texts; `place` returns where it is.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Describe where document ``index`` of the batch is, counted from 0 as `documents` yields.

        Also valid for the document at which `documents` raised.
        """


@dataclass(frozen=True)
class LineBatch(DocumentBatch):
    """Lines of a JSON Lines file, as content."""

    path: str
    taken: int
    first: int
    """Number of the first line, counted from 1."""
    content: tuple[bytes, ...]

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """Yield the texts of each line that is not blank."""
        for line in self.content:
            if not is_blank(line):
                yield texts_of(line, keys)

    def place(self, index: int) -> str:
        """Return the line number."""
        full = [number for number, line in enumerate(self.content) if not is_blank(line)]
        return f"line {self.first + full[index]} of {self.path}"


@dataclass(frozen=True)
class LineRangeBatch(DocumentBatch):
    """Lines of a JSON Lines file, as a byte range that is read when it is decoded."""

    path: str
    taken: int
    start: int
    """Byte of the file where the range starts; it is ``taken`` bytes long."""

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """Yield the texts of each line that is not blank."""
        return self._lines(first=0).documents(keys)

    def place(self, index: int) -> str:
        """Return the line number."""
        return self._lines(lines_before(self.path, self.start) + 1).place(index)

    def _lines(self, first: int) -> LineBatch:
        with open(self.path, "rb") as stream:
            stream.seek(self.start)
            content = stream.read(self.taken)
        return LineBatch(self.path, self.taken, first, tuple(io.BytesIO(content)))


@dataclass(frozen=True)
class TextBatch(DocumentBatch):
    """Documents of plain text files."""

    path: str
    taken: int
    where: tuple[str, ...]
    """Place of each document in the file, in words."""
    content: tuple[bytes, ...]

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """Yield the single text of each document; text files have one key."""
        for text in self.content:
            decode(text, "text")
            # `cat` leaves the BOM of a later file at the start of one of the lines.
            yield [[without_bom(text).replace(b"\n" + BOM, b"\n")]]

    def place(self, index: int) -> str:
        """Return the block of lines, or the file."""
        return f"{self.where[index]}{self.path}"


@dataclass(frozen=True)
class RowBatch(DocumentBatch):
    """Rows of a Parquet file."""

    path: str
    taken: int
    first: int
    """Number of the first row, counted from 0."""
    columns: tuple[tuple[Any, ...], ...]
    """Values of each key."""

    def documents(self, keys: Sequence[str]) -> Iterator[list[list[bytes]]]:
        """Yield the texts of each row."""
        for row in zip(*self.columns, strict=True):
            yield [as_texts(value, key) for value, key in zip(row, keys, strict=True)]

    def place(self, index: int) -> str:
        """Return the row number, counted from 0."""
        return f"row {self.first + index} of {self.path}"


def texts_of(line: bytes, keys: Sequence[str]) -> list[list[bytes]]:
    """Return the texts of each key of a JSON object.

    Example: `{"text": "a", "note": ["b", "c"]}` with keys text and note is [[b"a"], [b"b", b"c"]].

    Raises:
        UsageError: the line is not JSON, not an object, or a key has no text.
    """
    record = json_of_line(line, "content")
    if not isinstance(record, dict):
        raise UsageError("content", shown(record), "a JSON object")
    for key in keys:
        if key not in record:
            raise UsageError(f"--json-keys {key}", None, "a key of the record", keys_of(record))
    return [as_texts(record[key], key, keys_of(record)) for key in keys]


def as_texts(value: object, key: str, about: str = "") -> list[bytes]:
    """Return a text, or a list of texts, as a list in UTF-8.

    Args:
        value: of the key.
        key: its name.
        about: describes the record, for errors.
    """
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            expected = "the key of a text or a list of texts"
            raise UsageError(f"--json-keys {key}", shown(text), expected, about)
    return [check_unicode(str(text), f"--json-keys {key}").encode() for text in texts]


def read_batches(
    piece: FileSlice, keys: Sequence[str], text: TextDocuments, most: int = LONGEST_RECORD
) -> Iterator[DocumentBatch]:
    """Yield the documents of a slice, in order.

    Args:
        piece: what to read.
        keys: of the texts.
        text: what a document of a text file is.
        most: bytes of the longest line, block of lines, or row; also of the largest window of
            Zstandard above `zstd.SMALLEST_WINDOW`. At least `BATCH`.

    Raises:
        UsageError: the file cannot be read, is truncated, damaged or not of the format of its
            suffix, has a longer record, or a library that reads it is not installed.
    """
    path, kind = piece.file.path, piece.file.format
    try:
        if kind == "lines":
            yield from _ranges(piece, most)
        elif kind == "text":
            yield from _whole_text(path) if text == "file" else _blocks(path, most)
        elif kind == "parquet":
            yield from _rows(piece, keys, most)
        else:
            yield from _unpacked(path, kind, most)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError("--input", path, f"a readable {kind} file", str(error)) from None


def _ranges(piece: FileSlice, most: int) -> Iterator[DocumentBatch]:
    start = piece.start
    with open(piece.file.path, "rb") as stream:
        while start < piece.end:
            end = min(start + BATCH, piece.end)
            if end < piece.end:
                # Extend to the end of the line. Reading from the byte before finds a line end
                # exactly at `end`, and then extends by nothing.
                stream.seek(end - 1)
                while not (line := stream.readline(BATCH)).endswith(b"\n") and line:
                    if stream.tell() - end > most:
                        number = lines_before(piece.file.path, end) + 1
                        raise too_long(f"line {number} of {piece.file.path}", most, _LONGER)
                end = stream.tell()
            yield LineRangeBatch(piece.file.path, end - start, start)
            start = end


def _unpacked(path: str, kind: str, most: int) -> Iterator[DocumentBatch]:
    with open(path, "rb") as raw:
        stream: io.BufferedIOBase
        if kind == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        else:
            from megatron_moe.data.preprocess.zstd import ZstdReader

            stream = io.BufferedReader(ZstdReader(raw, most), BATCH)
        first, before, held = 1, 0, 0
        content: list[bytes] = []
        for line in bounded_lines(stream, path, most, _LONGER):
            content.append(line)
            held += len(line)
            if held >= BATCH:
                yield LineBatch(path, raw.tell() - before, first, tuple(content))
                before, first, held, content = raw.tell(), first + len(content), 0, []
        if content:
            yield LineBatch(path, raw.tell() - before, first, tuple(content))


def _whole_text(path: str) -> Iterator[DocumentBatch]:
    with open(path, "rb") as stream:
        content = stream.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        expected = f"a text file of <= {LARGEST_TEXT} bytes, to be one document"
        fix = "--text-documents block makes a document of each block between blank lines"
        raise UsageError("--input", path, expected, fix)
    if content:
        yield TextBatch(path, len(content), ("",), (content,))


def _blocks(path: str, most: int) -> Iterator[DocumentBatch]:
    """Yield the blocks of text between blank lines as documents."""
    where: list[str] = []
    blocks: list[bytes] = []
    lines: list[bytes] = []
    taken = held = size = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(bounded_lines(stream, path, most, _LONGER), 1):
            taken += len(line)
            if not is_blank(line):
                lines.append(line)
                size += len(line)
                if size > most:
                    raise too_long(f"the block that has line {number} of {path}", most, _LONGER)
                continue
            size = 0
            if lines:
                where.append(f"the block before line {number} of ")
                blocks.append(b"".join(lines))
                held, lines = held + len(blocks[-1]), []
            if held > BATCH:
                yield TextBatch(path, taken, tuple(where), tuple(blocks))
                where, blocks, taken, held = [], [], 0, 0
    if lines:
        where.append("the last block of ")
        blocks.append(b"".join(lines))
    if taken:
        yield TextBatch(path, taken, tuple(where), tuple(blocks))


def _rows(piece: FileSlice, keys: Sequence[str], most: int) -> Iterator[DocumentBatch]:
    path = piece.file.path
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fix = "pip install 'megatron-moe[data]', or pip install pyarrow"
        raise UsageError("--input", path, "read with pyarrow installed", fix) from None
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names, first = file.schema_arrow.names, 0
            for key in keys:
                if key not in names:
                    expected = f"columns of {path}, which has {', '.join(names)}"
                    raise UsageError("--json-keys", key, expected)
                if names.count(key) > 1:
                    expected = f"columns of different names in {path}"
                    raise UsageError("--json-keys", key, expected, f"{names.count(key)} have it")
            _check_rows(file.metadata, set(keys), path, most)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(dict.fromkeys(keys))):
                columns = tuple(_values(batch.column(key), key, path, first) for key in keys)
                # The bytes of a row are unknown, so progress assumes rows of equal size.
                rows = first + batch.num_rows
                bounds = [piece.file.size * i // file.metadata.num_rows for i in (first, rows)]
                yield RowBatch(path, bounds[1] - bounds[0], first, columns)
                first = rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # a name of a column, too
        reason = " ".join(str(error).split())
        raise UsageError("--input", path, "a readable Parquet file", reason) from None


def _check_rows(metadata: Any, keys: set[str], path: str, most: int) -> None:
    """Reject row groups whose rows have more than ``most`` bytes of a column on average."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            large = column.total_uncompressed_size > most * max(1, group.num_rows)
            if large and column.path_in_schema.split(".")[0] in keys:
                raise too_long(f"a row of row group {number} of {path}", most, _LONGER)


def _values(column: Any, key: str, path: str, first: int) -> tuple[Any, ...]:
    """Return the values of a column of some rows, the first of which has the number ``first``.

    Raises:
        UsageError: a string is not UTF-8, which some writers do not check; names the row.
    """
    try:
        return tuple(column.to_pylist())
    except UnicodeDecodeError:
        for row, value in enumerate(column, first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                found = error.object[error.start :][:8]
                what = f"--json-keys {key} in row {row} of {path}"
                raise UsageError(what, found, "UTF-8", str(error)) from None
        what = f"--json-keys {key} in rows {first} to {first + len(column) - 1} of {path}"
        raise UsageError(what, "other text", "UTF-8") from None
