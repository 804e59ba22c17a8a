"""Small corpora and configurations for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config import DataConfig, RunConfig, TrainConfig
from megatron_moe.data.indexed.manifest import Manifest
from megatron_moe.data.indexed.writer import IndexedWriter

VOCAB = 1000


MANIFEST = Manifest(
    tokenizer="ByteTokenizer",
    tokenizer_hash="bytes+3",
    vocab_size=259,
    key="text",
    append_eod=True,
    text_documents="file",
    domain=None,
    inputs=(),
)
"""Of bytes, in a data set without documents."""


def write(prefix: Path | str, documents: Sequence[Sequence[int]], vocab_size: int = VOCAB) -> str:
    """Indexed data with these documents."""
    with IndexedWriter(str(prefix), vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    return str(prefix)


def read_with_megatron_core(prefix: Path | str) -> list[list[int]]:
    """Every sequence, through Megatron-Core.

    Copied while the data set lives: its end unmaps the file under the arrays it gave out.
    """
    dataset = IndexedDataset(str(prefix))
    return [ids.tolist() for ids in dataset[:]]


def random_documents(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to ``longest`` ids below VOCAB - 1, which ends each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, count)
    return [[*rng.integers(0, VOCAB - 1, length).tolist(), VOCAB - 1] for length in lengths]


def run_config(*paths: str, **changes: Any) -> RunConfig:
    """A configuration over ``paths``; ``changes`` go to the data or the train section."""
    data: dict[str, Any] = {"data_path": paths, "seq_length": 16, "vocab_size": VOCAB}
    data |= {"num_workers": 0, "split": "1,0,0"}
    train: dict[str, Any] = {"micro_batch_size": 2, "train_iters": 5, "eval_iters": 2}
    own = set(DataConfig.__dataclass_fields__)
    data |= {key: value for key, value in changes.items() if key in own}
    train |= {key: value for key, value in changes.items() if key not in own}
    return replace(RunConfig(), data=DataConfig(**data), train=TrainConfig(**train))
