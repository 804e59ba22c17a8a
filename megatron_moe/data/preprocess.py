"""JSON Lines to indexed data: what Megatron-LM's `tools/preprocess_data.py` does, as a library.

Lines stream through worker processes in batches; a bounded number is under way at any time, and a
worker that dies is an error rather than a wait. What is written does not depend on their number.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.tokenizer import Tokenizer, build_tokenizer, unpadded_vocab_size
from megatron_moe.errors import UsageError

_BATCH = 1 << 18
"""Bytes of text that one task tokenizes."""
_AHEAD = 4
"""Tasks under way per worker."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to tokenize and where to write it."""

    input: tuple[str, ...]
    """JSON Lines files, read one after the other."""
    output_prefix: str
    """Files are named `{output_prefix}_{key}_document.bin` and `.idx`."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields to tokenize, each into files of its own."""
    append_eod: bool = False
    """End every document that is not empty with the tokenizer's end-of-document id."""
    workers: int = 1
    """Processes that tokenize; 1 tokenizes in this one."""
    log_interval: int = 1000
    """Documents between updates of the progress line."""


@dataclass(frozen=True)
class Lines:
    """Some lines of one file."""

    path: str
    first: int
    """Number of the first, counted from 1."""
    content: tuple[bytes, ...]


@dataclass(frozen=True)
class Encoded:
    """Documents of one key: ids, tokens of each sequence, sequences of each document."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Refusal:
    """The arguments of a `UsageError` from a worker, as exceptions do not travel with four."""

    arguments: tuple[str, object, str, str]


Result = list[Encoded] | Refusal


def output_prefixes(options: PreprocessOptions) -> list[str]:
    """The prefix of each key's files."""
    return [f"{options.output_prefix}_{key}_document" for key in options.json_keys]


def preprocess(options: PreprocessOptions, data: DataConfig, *, progress: bool = True) -> int:
    """Tokenize the files into indexed data.

    Args:
        options: what and where.
        data: names the tokenizer and the vocabulary size.
        progress: show a progress line on standard error.

    Returns:
        The number of documents.

    Raises:
        UsageError: a file cannot be read, a line is not a JSON object with the keys, an id is
            outside the vocabulary. Nothing is written then.
    """
    limit = unpadded_vocab_size(data, build_tokenizer(data))
    documents, due = 0, options.log_interval
    with ExitStack() as stack:
        total = sum(_size_of(path) for path in options.input)
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress, mininterval=1.0)
        )
        writers = [
            stack.enter_context(IndexedWriter(prefix, limit)) for prefix in output_prefixes(options)
        ]
        for lines, result in _encoded(options, data):
            if isinstance(result, Refusal):
                raise UsageError(*result.arguments)
            for writer, encoded in zip(writers, result, strict=True):
                writer.add_documents(encoded.ids, encoded.lengths, encoded.sequences)
            documents = writers[0].documents
            if documents >= due:
                bar.set_postfix_str(f"{documents} documents", refresh=False)
                due = documents - documents % options.log_interval + options.log_interval
            bar.update(sum(map(len, lines.content)))
        bar.set_postfix_str(f"{documents} documents")
    return documents


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UsageError("--input", path, "a readable file", str(error)) from None


def read_batches(paths: Sequence[str]) -> Iterator[Lines]:
    """The lines of all files, in order, in batches of some size."""
    for path in paths:
        try:
            with open(path, "rb") as stream:
                first = 1
                while content := stream.readlines(_BATCH):
                    yield Lines(path, first, tuple(content))
                    first += len(content)
        except OSError as error:
            raise UsageError("--input", path, "a readable file", str(error)) from None


def encode(tokenizer: Tokenizer, lines: Lines, keys: Sequence[str], append_eod: bool) -> Result:
    """Tokenize some lines. Blank lines are no documents.

    A field is a text, or a list of texts, which become sequences of one document. Sequences without
    ids are left out, as Megatron-LM leaves them out.
    """
    columns: list[list[list[list[int]]]] = [[] for _ in keys]
    for number, line in enumerate(lines.content, lines.first):
        if line.isspace():
            continue
        try:
            for column, texts in zip(columns, _texts(line, keys), strict=True):
                sequences = [ids for text in texts if (ids := tokenizer.tokenize(text))]
                if append_eod and sequences:
                    sequences[-1].append(tokenizer.eod)
                column.append(sequences)
        except UsageError as error:
            what = f"{error.what}, line {number} of {lines.path}"
            return Refusal((what, error.found, error.expected, error.fix))
    return [_pack(column) for column in columns]


def _texts(line: bytes, keys: Sequence[str]) -> Iterator[list[str]]:
    try:
        record = json.loads(line)
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise UsageError("JSON", _start(line), "an object", str(error)) from None
    for key in keys:
        value = record.get(key) if isinstance(record, dict) else None
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            expected = f"an object with a text in {key!r}"
            raise UsageError(f"--json-keys {key}", _start(line), expected)
        yield list(map(str, texts))


def _start(line: bytes) -> str:
    return line[:60].decode("utf-8", errors="replace")


def _pack(documents: list[list[list[int]]]) -> Encoded:
    sequences = [ids for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
    flat = (value for ids in sequences for value in ids)
    return Encoded(
        ids=np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())),
        lengths=lengths,
        sequences=np.array([len(document) for document in documents], dtype=np.int64),
    )


def _encoded(options: PreprocessOptions, data: DataConfig) -> Iterator[tuple[Lines, Result]]:
    """Every batch with its result, in order."""
    batches = read_batches(options.input)
    if options.workers <= 1:
        tokenizer = build_tokenizer(data)
        for lines in batches:
            yield lines, encode(tokenizer, lines, options.json_keys, options.append_eod)
        return
    pending: deque[tuple[Lines, Future[Result]]] = deque()
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), initializer=_start_worker, initargs=(data,)
    ) as pool:
        try:
            for lines in batches:
                task = pool.submit(_work, lines, options.json_keys, options.append_eod)
                pending.append((lines, task))
                if len(pending) >= _AHEAD * options.workers:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        except BrokenProcessPool:
            raise UsageError(
                "--workers", options.workers, "workers that live", "one was killed; out of memory?"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: list[Tokenizer] = []
"""Of a worker process: models are not sent with every task."""


def _start_worker(data: DataConfig) -> None:
    _worker_tokenizer[:] = [build_tokenizer(data)]


def _work(lines: Lines, keys: Sequence[str], append_eod: bool) -> Result:
    return encode(_worker_tokenizer[0], lines, keys, append_eod)
