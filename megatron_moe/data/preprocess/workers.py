"""Worker processes that tokenize batches: results in order, a bounded number under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from types import TracebackType

from megatron_moe.config import DataConfig
from megatron_moe.data.preprocess.encoding import Result, encode
from megatron_moe.data.preprocess.reading import Batch
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer

_AHEAD = 4
"""Batches under way per worker."""
_IMPORTED = [
    "__main__",
    "megatron_moe.data.preprocess.workers",
    "sentencepiece.sentencepiece_model_pb2",
]
"""By the process that workers are forked from: once, rather than by each."""


def start_early() -> None:
    """Start the process that workers are forked from, which takes a moment, without waiting."""
    get_context("forkserver").set_forkserver_preload(_IMPORTED)
    ensure_running()


class Workers:
    """Context manager. One worker is this process; more are processes of their own.

    A worker that dies is an error rather than a wait.
    """

    def __init__(
        self, count: int, data: DataConfig, keys: Sequence[str], append_eod: bool, word_cache: bool
    ) -> None:
        self._count, self._how = count, (tuple(keys), append_eod)
        self._start = (data, word_cache)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count == 1:
            _prepare(*self._start)
        else:
            start_early()
            self._pool = ProcessPoolExecutor(
                self._count,
                get_context("forkserver"),
                initializer=_prepare,
                initargs=self._start,
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
        _tokenizer.clear()

    def encode(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Result]]:
        """Every batch with its result, in order."""
        if self._pool is None:
            for batch in batches:
                yield batch, _work(batch, *self._how)
            return
        pending: deque[tuple[Batch, Future[Result]]] = deque()
        try:
            for batch in batches:
                pending.append((batch, self._pool.submit(_work, batch, *self._how)))
                if len(pending) >= _AHEAD * self._count:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        except BrokenProcessPool:
            raise UsageError(
                "--workers", self._count, "workers that live", "one was killed; out of memory?"
            ) from None


_tokenizer: list[Tokenizer] = []
"""Of a worker process: models are not sent with every batch."""


def _prepare(data: DataConfig, word_cache: bool) -> None:
    tokenizer = build_tokenizer(data)
    tokenizer.enable_fast_encode()
    if word_cache:
        tokenizer.enable_word_cache()
    _tokenizer[:] = [tokenizer]


def _work(batch: Batch, keys: Sequence[str], append_eod: bool) -> Result:
    return encode(_tokenizer[0], batch, keys, append_eod)
