"""Measures how many documents a second different numbers of workers tokenize."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config import DataConfig
from megatron_moe.data.preprocess.corpus import PreprocessOptions
from megatron_moe.data.preprocess.encoding import EncodeError, EncoderPool, start_fork_server
from megatron_moe.data.preprocess.inputs import FileSlice, cut, find_inputs
from megatron_moe.data.preprocess.reading import read_batches
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One measurement."""

    workers: int
    documents: int
    seconds: float

    @property
    def rate(self) -> float:
        """Documents per second."""
        return self.documents / max(self.seconds, 1e-9)


def measure_workers(
    options: PreprocessOptions, data: DataConfig, workers: Sequence[int], max_documents: int
) -> list[Speed]:
    """Tokenize the first documents with each number of workers; writes nothing.

    The start of the workers is not measured: time counts from the first batch of results.

    Args:
        options: what to tokenize.
        data: names the tokenizer.
        workers: numbers to try.
        max_documents: documents after which a trial ends, at a whole batch.

    Returns:
        The fastest first.

    Raises:
        UsageError: a document cannot be read or tokenized.
    """
    slices = cut(find_inputs(options.input), 1)[0]
    found = [_measure(options, data, slices, count, max_documents) for count in workers]
    return sorted(found, key=lambda speed: speed.rate, reverse=True)


def _measure(
    options: PreprocessOptions,
    data: DataConfig,
    slices: Sequence[FileSlice],
    workers: int,
    max_documents: int,
) -> Speed:
    keys = options.json_keys
    pool = EncoderPool(
        workers, data, keys, append_eod=options.append_eod, word_cache=options.word_cache
    )
    if workers > 1:
        start_fork_server()
    reading = (keys, options.text_documents, options.max_record_bytes)
    batches = (batch for piece in slices for batch in read_batches(piece, *reading))
    sizes: list[int] = []
    begin = start = time.perf_counter()
    with pool:
        for _, result in pool.encode(batches):
            if isinstance(result, EncodeError):
                raise UsageError(*result.arguments)
            sizes.append(len(result[0].sequences))
            if len(sizes) == 1:
                start = time.perf_counter()
            if sum(sizes) >= max_documents:
                break
        end = time.perf_counter()
    if len(sizes) == 1:  # too little for a comparison, but a number all the same
        return Speed(workers=workers, documents=sizes[0], seconds=end - begin)
    return Speed(workers=workers, documents=sum(sizes[1:]), seconds=end - start)


def speed_table(found: Sequence[Speed]) -> str:
    """Format measurements, the fastest first, and name it."""
    lines = ["documents per second, fastest first:"]
    lines += [f"{n}. {each.workers} workers: {each.rate:.1f}" for n, each in enumerate(found, 1)]
    return "\n".join([*lines, f"fastest: --workers {found[0].workers}"])
