"""What reading data costs a training step, and what opening a corpus costs a start.

A step of the tiny preset takes about half a second on two cores; waiting for its batch should not
be seen.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.record import Record
from megatron_moe.config import DataConfig, RunConfig, TrainConfig
from megatron_moe.data.batch import fetch_step
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.pipeline import Data, build_data

STEP_SECONDS = 0.45
SHARE = 0.01
"""Of a step, that its batch may be waited for."""
STEPS = 8
MICRO, MICRO_BATCHES, SEQ_LENGTH = 4, 2, 256
"""The tiny preset's."""
VOCAB, TOKENS = 8192, 5_000_000


def records() -> list[Record]:
    """Time per step in `fetch_step` with and without a background worker, and time to open."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "corpus")
        _write(prefix)
        found = [
            Record(name=f"data/open_5M_tokens/{kind}", value=_open(prefix)[1], unit="ms")
            for kind in ("first", "again")
        ]
        for workers in (0, 1):
            for seq_length in (SEQ_LENGTH, 2048):
                found.append(_wait(prefix, workers, seq_length))
    return found


def _write(prefix: str) -> None:
    """Documents of about 1000 random ids."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, VOCAB) as writer:
        while writer.tokens < TOKENS:
            writer.add_document(rng.integers(0, VOCAB, rng.integers(1, 2000)))


def _open(prefix: str, workers: int = 0, seq_length: int = SEQ_LENGTH) -> tuple[Data, float]:
    """The data, and the milliseconds until it is there."""
    config = replace(
        RunConfig(),
        data=DataConfig(
            data_path=(prefix,),
            split="98,2,0",
            seq_length=seq_length,
            vocab_size=VOCAB,
            num_workers=workers,
        ),
        train=TrainConfig(micro_batch_size=MICRO, train_iters=100, eval_iters=10),
    )
    start = time.perf_counter()
    data = build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=MICRO_BATCHES,
        consumed_train_samples=0,
        reads_data=True,
    )
    return data, 1e3 * (time.perf_counter() - start)


def _wait(prefix: str, workers: int, seq_length: int) -> Record:
    """Median wait for a step's batches while the processor computes in between."""
    data, _ = _open(prefix, workers, seq_length)
    matrix, waits = torch.rand(256, 256), []
    for _ in range(STEPS):
        start = time.perf_counter()
        fetch_step(data.train, MICRO_BATCHES, None, (MICRO, seq_length), torch.device("cpu"))
        waits.append(time.perf_counter() - start)
        while time.perf_counter() < start + STEP_SECONDS:
            matrix @ matrix
    share = median(waits[1:]) / STEP_SECONDS
    return Record(
        name=f"data/wait_per_step/8x{seq_length}/workers{workers}",
        value=100 * share,
        unit=f"% of {STEP_SECONDS} s",
        target=f"<= {100 * SHARE:g}",
        met=share <= SHARE,
    )
