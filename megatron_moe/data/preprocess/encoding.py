"""Tokenizes batches of documents in worker processes, and writes their ids in order.

    main process                                  worker process
    FileSlice -> read_batches -> DocumentBatch -> documents() -> Tokenizer.encode
    IndexedWriter.add_documents <- EncodedDocuments (one per key) <-

Results are written in the order of the batches, so the output does not depend on the number of
workers. At most `_BATCHES_PER_WORKER` batches per worker are in progress, which bounds the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.preprocess.reading import DocumentBatch
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer

_BATCHES_PER_WORKER = 4
"""Batches in progress per worker: enough that no worker waits while results are written."""
_PRELOADED = [
    "__main__",
    "megatron_moe.data.preprocess.encoding",
    "sentencepiece.sentencepiece_model_pb2",
]
"""Imported once by the fork server, from which workers are forked, instead of by each worker."""


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents of one key, in the form of `IndexedWriter.add_documents`."""

    ids: npt.NDArray[np.int32]
    """Token ids of all documents."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each sequence."""
    sequences: npt.NDArray[np.int64]
    """Sequences of each document."""
    text_bytes: int
    """Size of the texts in UTF-8."""


@dataclass(frozen=True)
class EncodeError:
    """The arguments of a `UsageError` in a worker.

    Exceptions are rebuilt in the main process from their message alone, which does not work for an
    exception with four arguments, so the arguments are sent.
    """

    arguments: tuple[str, object, str, str]


EncodeResult = list[EncodedDocuments] | EncodeError


class _Column:
    """Collects the documents of one key."""

    def __init__(self, tokenizer: Tokenizer, append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._eod = np.array([tokenizer.eod], np.int32) if append_eod else None
        self._parts: list[npt.NDArray[np.int32]] = []
        self._lengths: list[int] = []
        self._sequences: list[int] = []
        self._bytes = 0

    def add(self, texts: Sequence[bytes]) -> None:
        """Add a document. Each text becomes a sequence; texts without ids are left out.

        Example with end of document: texts a, "" and bc as bytes become the sequences [100] and
        [101, 102, 1]. A document without any ids stays empty, as in Megatron-LM.
        """
        before = len(self._lengths)
        for text in texts:
            ids = self._tokenizer.encode(text)
            self._bytes += len(text)
            if len(ids):
                self._parts.append(ids)
                self._lengths.append(len(ids))
        count = len(self._lengths) - before
        if count and self._eod is not None:
            self._parts.append(self._eod)
            self._lengths[-1] += 1
        self._sequences.append(count)

    def pack(self) -> EncodedDocuments:
        """Join all documents."""
        return EncodedDocuments(
            ids=np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32),
            lengths=np.array(self._lengths, dtype=np.int64),
            sequences=np.array(self._sequences, dtype=np.int64),
            text_bytes=self._bytes,
        )


def encode_batch(
    tokenizer: Tokenizer, batch: DocumentBatch, keys: Sequence[str], append_eod: bool
) -> EncodeResult:
    """Tokenize a batch; an error names the document.

    A field is a text, or a list of texts, which become sequences of one document. Sequences without
    ids are left out, as in Megatron-LM.
    """
    columns = [_Column(tokenizer, append_eod) for _ in keys]
    done = 0
    try:
        for fields in batch.documents(keys):
            for column, texts in zip(columns, fields, strict=True):
                column.add(texts)
            done += 1
    except UsageError as error:
        what = f"{error.what} in {batch.place(done)}"
        return EncodeError((what, error.found, error.expected, error.fix))
    except OSError as error:
        return EncodeError(("--input", batch.path, "a readable file", str(error)))
    return [column.pack() for column in columns]


def write_documents(
    writers: Sequence[IndexedWriter],
    batches: Iterator[DocumentBatch],
    pool: EncoderPool,
    advance: Callable[[DocumentBatch], object],
) -> list[int]:
    """Tokenize batches into one writer per key.

    Args:
        writers: one for each key.
        batches: the documents.
        pool: tokenizes them.
        advance: called after each batch is written.

    Returns:
        The bytes of text that each writer received.

    Raises:
        UsageError: a document cannot be read or tokenized, or an id is outside the vocabulary.
    """
    text_bytes = [0 for _ in writers]
    for batch, result in pool.encode(batches):
        if isinstance(result, EncodeError):
            raise UsageError(*result.arguments)
        for number, (writer, encoded) in enumerate(zip(writers, result, strict=True)):
            writer.add_documents(encoded.ids, encoded.lengths, encoded.sequences)
            text_bytes[number] += encoded.text_bytes
        advance(batch)
    return text_bytes


def start_fork_server() -> None:
    """Start the process from which workers are forked, without waiting for it.

    Its imports take about a second, which the main process spends on hashing the input.
    """
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    ensure_running()


class EncoderPool:
    """Context manager that tokenizes batches in worker processes.

    A single worker is the calling process. A worker that is killed raises an error.

    Args:
        workers: number of processes.
        data: names the tokenizer.
        keys: of the texts of a document.
        append_eod: whether documents end with the end-of-document id.
        word_cache: whether to cache the ids of words where this changes no id.
    """

    def __init__(
        self,
        workers: int,
        data: DataConfig,
        keys: Sequence[str],
        *,
        append_eod: bool,
        word_cache: bool,
    ) -> None:
        self._workers, self._how = workers, (tuple(keys), append_eod)
        self._tokenizer = (data, word_cache)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncoderPool:
        if self._workers == 1:
            _prepare_worker(*self._tokenizer)
        else:
            start_fork_server()
            self._pool = ProcessPoolExecutor(
                self._workers,
                get_context("forkserver"),
                initializer=_prepare_worker,
                initargs=self._tokenizer,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        _worker_tokenizer.clear()

    def encode(
        self, batches: Iterator[DocumentBatch]
    ) -> Iterator[tuple[DocumentBatch, EncodeResult]]:
        """Yield every batch with its result, in order."""
        if self._pool is None:
            for batch in batches:
                yield batch, _encode_in_worker(batch, *self._how)
            return
        pending: deque[tuple[DocumentBatch, Future[EncodeResult]]] = deque()
        try:
            for batch in batches:
                pending.append((batch, self._pool.submit(_encode_in_worker, batch, *self._how)))
                # The oldest batch is awaited even if later ones are done: this keeps the order.
                if len(pending) >= _BATCHES_PER_WORKER * self._workers:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        except BrokenProcessPool:
            raise UsageError(
                "--workers",
                self._workers,
                "a number of processes that fit into memory",
                "a worker was killed, usually because memory ran out",
            ) from None


_worker_tokenizer: list[Tokenizer] = []
"""Of a worker process, set by `_prepare_worker`: a model is too large to send with every batch."""


def _prepare_worker(data: DataConfig, word_cache: bool) -> None:
    tokenizer = build_tokenizer(data)
    tokenizer.enable_fast_encode()
    if word_cache:
        tokenizer.enable_word_cache()
    _worker_tokenizer[:] = [tokenizer]


def _encode_in_worker(batch: DocumentBatch, keys: Sequence[str], append_eod: bool) -> EncodeResult:
    return encode_batch(_worker_tokenizer[0], batch, keys, append_eod)
