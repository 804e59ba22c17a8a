"""What it takes to index 10^9 tokens, once per corpus: seconds, and memory over the process's own.

The corpus is synthetic: an index of 10^6 documents, and a file of tokens that is one hole. Only the
index is read, as at the first start of a run after its checks; the result would go to the cache.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from bench.record import Record
from megatron_moe.config import DataConfig, RunConfig, TrainConfig
from megatron_moe.data.blend import Blend
from megatron_moe.data.datasets import build_split
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.format import HEADER, MAGIC, VERSION
from megatron_moe.data.objectives.rng import sample_rng
from megatron_moe.data.objectives.windows import cut_windows
from megatron_moe.tokenizer.simple import NullTokenizer

DOCUMENTS, LONGEST = 1_000_000, 2000
"""10^9 tokens, near enough."""
SEQ_LENGTH, VOCAB, UINT16 = 2048, 60000, 8
WINDOWS, SHARES = (1131, 1524, 1019), (2, 3, 5)
"""Tokens of text that UL2's kinds of rows take at 2048, and their shares."""
SECONDS, MEGABYTES = 5.0, 256.0
"""Bounds of what `seconds and little memory` means."""


def records() -> list[Record]:
    """Seconds and megabytes for causal samples and for windows of denoisers."""
    lengths = np.random.default_rng(0).integers(1, LONGEST, DOCUMENTS).astype("<i4")
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "corpus")
        _write(prefix, lengths)
        kinds: dict[str, Callable[[], None]] = {
            "causal": lambda: _causal(prefix),
            "ul2": lambda: _windows(lengths),
        }
        return [record for name, build in kinds.items() for record in _records(name, build)]


def _write(prefix: str, lengths: np.ndarray) -> None:
    ends = np.cumsum(lengths, dtype="<i8") * 2
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, UINT16, len(lengths), len(lengths) + 1))
        for values in (lengths, ends - 2 * lengths, np.arange(len(lengths) + 1, dtype="<i8")):
            values.tofile(index)
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(int(ends[-1]))


def _causal(prefix: str) -> None:
    """An epoch: as many samples as the corpus has."""
    source = inspect_source(prefix)
    data = DataConfig(data_path=(prefix,), seq_length=SEQ_LENGTH, vocab_size=VOCAB)
    config = replace(RunConfig(), data=data, train=TrainConfig(train_iters=1))
    blend = Blend(flag="--data-path", prefixes=(prefix,), weights=None, bounds=(0.0, 1.0))
    samples = (source.tokens - 1) // SEQ_LENGTH
    dataset = build_split("train", blend, samples, config, NullTokenizer(VOCAB), {prefix: source})
    assert len(dataset) == samples  # type: ignore[arg-type]


def _windows(lengths: np.ndarray) -> None:
    """An epoch, whatever the number of samples."""
    cut_windows(sample_rng(0), np.arange(len(lengths)), lengths, WINDOWS, SHARES, 1)


def _records(name: str, build: Callable[[], None]) -> list[Record]:
    """In a process of its own, so that what others left does not count."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(build, there))
    process.start()
    there.close()
    seconds, megabytes = here.recv()
    process.join()
    return [
        Record(
            name=f"data/index_1e9_tokens/{name}/time",
            value=seconds,
            unit="s",
            target=f"<= {SECONDS:g}",
            met=seconds <= SECONDS,
        ),
        Record(
            name=f"data/index_1e9_tokens/{name}/memory",
            value=megabytes,
            unit="MB",
            target=f"<= {MEGABYTES:g}",
            met=megabytes <= MEGABYTES,
        ),
    ]


def _measure(build: Callable[[], None], out: Connection) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kilobytes("VmRSS")
    start = time.perf_counter()
    build()
    seconds = time.perf_counter() - start
    out.send((seconds, (_kilobytes("VmHWM") - before) * 1024 / 1e6))


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
