"""What making the samples of an objective costs a training step: at most 2% of it.

Batches are made in the training process here, where all of their cost is waited for. Files are in
memory. A step of the tiny preset takes about half a second on two cores.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.record import Record
from megatron_moe.config import DataConfig, ObjectiveConfig, RunConfig, TrainConfig
from megatron_moe.config.training import Objective
from megatron_moe.data.batch import fetch_step
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.pipeline import Data, build_data

STEP_SECONDS = 0.45
SHARE = 0.02
"""Of a step."""
STEPS = 40
MICRO, MICRO_BATCHES = 4, 2
"""The tiny preset's."""
LENGTHS = (256, 2048)
"""Its own sequence length, and that of the published sizes."""
OBJECTIVES: tuple[Objective, ...] = ("causal", "prefix-lm", "ul2", "sft")
VOCAB, TOKENS = 259, 5_000_000


def records() -> list[Record]:
    """Time per step to make its batches."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, chat = str(Path(folder) / "corpus"), str(Path(folder) / "chat.jsonl")
        _write(tokens)
        _write_chat(chat)
        return [
            _wait(chat if name == "sft" else tokens, name, length)
            for name in OBJECTIVES
            for length in LENGTHS
        ]


def _write(prefix: str) -> None:
    """Documents of about 1000 random bytes."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, VOCAB) as writer:
        while writer.tokens < TOKENS:
            writer.add_document(rng.integers(3, VOCAB, rng.integers(1, 2000)))


def _write_chat(path: str) -> None:
    """Conversations of two exchanges, about 600 bytes each."""
    draw = np.random.default_rng(0)
    with open(path, "w") as stream:
        for _ in range(2000):
            sizes = draw.integers(1, 300, 4)
            turns = [
                {"role": ("user", "assistant")[i % 2], "content": "x" * int(size)}
                for i, size in enumerate(sizes)
            ]
            stream.write(json.dumps(turns) + "\n")


def _open(prefix: str, objective: Objective, seq_length: int) -> Data:
    data = DataConfig(
        data_path=(prefix,),
        split="1,0,0",
        seq_length=seq_length,
        tokenizer_type="ByteTokenizer",
        vocab_extra_ids=300,
        num_workers=0,
    )
    train = TrainConfig(micro_batch_size=MICRO, train_iters=STEPS, eval_iters=0)
    config = replace(
        RunConfig(), data=data, train=train, objective=ObjectiveConfig(objective=objective)
    )
    return build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=MICRO_BATCHES,
        consumed_train_samples=0,
        reads_data=True,
    )


def _wait(prefix: str, objective: Objective, seq_length: int) -> Record:
    data, waits = _open(prefix, objective, seq_length), []
    for _ in range(STEPS // MICRO_BATCHES):
        start = time.perf_counter()
        fetch_step(data.train, MICRO_BATCHES, None, (MICRO, seq_length), torch.device("cpu"))
        waits.append(time.perf_counter() - start)
    share = median(waits) / STEP_SECONDS
    return Record(
        name=f"objectives/wait_per_step/{objective}/{MICRO * MICRO_BATCHES}x{seq_length}",
        value=100 * share,
        unit=f"% of {STEP_SECONDS} s",
        target=f"<= {100 * SHARE:g}",
        met=share <= SHARE,
    )


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
