"""`--mock-data`: synthetic documents, to try or to measure a run without a data set.

As Megatron-LM's mock data set: documents of random lengths, in which each id is followed by the
next one, so that a model learns them at once. They are written once, as an indexed data set like
any other, and therefore work with every objective on indexed data and every layout.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from dataclasses import replace

import numpy as np

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.tokenizer.base import Tokenizer

DOCUMENTS = 2000
LONGEST = 2048
"""Tokens of a document at most, its end included; Megatron-LM's have 4096."""


def with_mock_data(data: DataConfig, tokenizer: Tokenizer) -> DataConfig:
    """The settings with the prefix of the synthetic documents, if `--mock-data` asks for them.

    Args:
        data: of the run.
        tokenizer: whose ids the documents have; each ends with its `eod`.

    Raises:
        UsageError: the cache directory cannot be written.
    """
    if not data.mock_data:
        return data
    name = f"megatron-moe-mock-{getpass.getuser()}"
    folder = data.data_cache_path or os.path.join(tempfile.gettempdir(), name)
    prefix = os.path.join(folder, f"mock-{tokenizer.vocab_size}-{tokenizer.eod}")
    if not all(os.path.exists(path) for path in paths_of(prefix)):
        _write(prefix, tokenizer)
    return replace(data, mock_data=False, data_path=(prefix,))


def _write(prefix: str, tokenizer: Tokenizer) -> None:
    """The same documents on every rank; whichever finishes last replaces equal files."""
    draw = np.random.default_rng(0)
    others = max(tokenizer.vocab_size - 1, 1)
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for length in draw.integers(2, LONGEST, DOCUMENTS, endpoint=True):
            ids = (int(draw.integers(others)) + np.arange(length)) % others
            ids += ids >= tokenizer.eod  # every id but that of the end
            ids[-1] = tokenizer.eod
            writer.add_document(ids)
