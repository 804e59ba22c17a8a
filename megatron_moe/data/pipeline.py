"""The micro-batches of one data-parallel rank, in an order that only the seed decides.

Step s of a run uses the samples [s * G, (s + 1) * G) of the blended order, G the global batch size.
Of these, micro-batch m of data-parallel rank r takes the B rows from m * B * DP + r * B on, so the
samples of a step are the same in every layout, and a run that stopped after n samples goes on with
sample n whatever its layout is then.

B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.blend import SPLITS, Blend, blends_of, usable
from megatron_moe.data.causal import Sample
from megatron_moe.data.datasets import build_split, cache_for
from megatron_moe.data.indexed_check import Source, check_range, inspect_source, source_range
from megatron_moe.data.tokenizer import Tokenizer, build_tokenizer, unpadded_vocab_size
from megatron_moe.errors import UsageError

logger = logging.getLogger(__name__)

Packed = npt.NDArray[np.int32]
"""A micro-batch [3, B, S]: tokens, labels, and a mask of 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows of a global batch this rank reads."""

    micro_batch_size: int
    num_microbatches: int
    dp_rank: int
    dp_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.micro_batch_size * self.num_microbatches * self.dp_size


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of each micro-batch, for whole global batches of [start, stop)."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self.rows, self.start = rows, start
        self.steps = max(stop - start, 0) // rows.global_batch_size

    def __len__(self) -> int:
        return self.steps * self.rows.num_microbatches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.rows.micro_batch_size
        first = self.start + self.rows.dp_rank * size
        for _ in range(len(self)):
            yield list(range(first, first + size))
            first += size * self.rows.dp_size


@dataclass(frozen=True, kw_only=True)
class Data:
    """What `build_data` gives a rank."""

    train: Iterator[Batch] | None
    """Micro-batches from `consumed_train_samples` to the end of the run; `None` if this rank does
    not read."""
    has_valid: bool
    """Whether there is validation data; the same on every rank."""
    has_test: bool
    identity: dict[str, Any]
    """What decides the order of training samples: content of the sources, weights, split, sequence
    length, seed, tokenizer. Not paths, layout or length of the run."""
    loaders: dict[str, DataLoader[Packed]]
    """Of the evaluation splits; empty if this rank does not read."""

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def valid(self) -> Iterator[Batch] | None:
        """The validation micro-batches from the start, the same at each call.

        A call ends the iterator of the one before. `None` if there is no such data or this rank
        does not read.
        """
        return self._fresh("valid")

    def test(self) -> Iterator[Batch] | None:
        """Likewise for test data."""
        return self._fresh("test")

    def _fresh(self, name: str) -> Iterator[Batch] | None:
        return map(to_batch, iter(self.loaders[name])) if name in self.loaders else None


def build_data(
    config: RunConfig,
    *,
    dp_rank: int,
    dp_size: int,
    num_microbatches: int,
    consumed_train_samples: int,
    reads_data: bool,
) -> Data:
    """Check all sources and open those that this rank reads. To be called on every rank.

    The checks are the same on every rank and communicate nothing, so bad data ends every rank with
    the same line.

    Args:
        config: the run's.
        dp_rank: this rank's place among the data-parallel ranks.
        dp_size: their number.
        num_microbatches: micro-batches of one step.
        consumed_train_samples: where to go on.
        reads_data: whether this rank gives batches to the model: tensor-parallel rank 0 of the
            first and last pipeline stage.

    Raises:
        UsageError: missing, broken or empty data, ids beyond the vocabulary, flags in conflict.
    """
    tokenizer = build_tokenizer(config.data)
    blends = blends_of(config.data)
    if config.train.eval_iters == 0:
        blends.update(valid=None, test=None)
    sources = _check_sources(blends, config, tokenizer)
    asked = dict(blends)
    blends = {name: usable(name, asked[name], config.data.split, sources) for name in SPLITS}
    if asked["test"] and not blends["test"] and reads_data and dp_rank == 0:
        logger.warning("--split %s leaves no test data", config.data.split)
    rows = Rows(
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=num_microbatches,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    loaders: dict[str, DataLoader[Packed]] = {}
    for name, blend in blends.items():
        samples = _samples_of(name, config, rows)
        if reads_data and blend:
            dataset = build_split(name, blend, samples, config, tokenizer, sources)
            start = consumed_train_samples if name == "train" else 0
            sampler = MicroBatchSampler(rows, start, samples)
            loaders[name] = _loader(dataset, sampler, config.data.num_workers, name != "train")
    train = loaders.pop("train", None)
    return Data(
        train=None if train is None else map(to_batch, iter(train)),
        has_valid=blends["valid"] is not None,
        has_test=blends["test"] is not None,
        identity=_identity(blends["train"], config, tokenizer, sources),
        loaders=loaders,
    )


def _check_sources(
    blends: dict[str, Blend | None], config: RunConfig, tokenizer: Tokenizer
) -> dict[str, Source]:
    """Every source that is used, looked through."""
    limit = unpadded_vocab_size(config.data, tokenizer)
    sources: dict[str, Source] = {}
    for blend in filter(None, blends.values()):
        for prefix in blend.prefixes:
            if prefix not in sources:
                sources[prefix] = inspect_source(prefix)
                found = source_range(sources[prefix], cache_for(prefix, config))
                check_range(sources[prefix], found, limit)
    return sources


def _samples_of(name: str, config: RunConfig, rows: Rows) -> int:
    """Samples to draw from a split during the whole run."""
    if name != "train":
        return config.train.eval_iters * rows.global_batch_size
    if config.train.train_samples is not None:
        return config.train.train_samples
    if config.train.train_iters is not None:
        return config.train.train_iters * rows.global_batch_size
    raise UsageError("--train-iters", None, "a number of steps, or --train-samples")


def _identity(
    train: Blend | None, config: RunConfig, tokenizer: Tokenizer, sources: dict[str, Source]
) -> dict[str, Any]:
    assert train is not None
    return {
        "sources": [sources[prefix].fingerprint for prefix in train.prefixes],
        "weights": None if train.weights is None else list(train.weights),
        "documents": list(train.bounds),
        "seq_length": config.data.seq_length,
        "seed": config.train.seed,
        "tokenizer": tokenizer.identity,
    }


def _loader(
    dataset: Dataset[Any], sampler: MicroBatchSampler, workers: int, persistent: bool
) -> DataLoader[Packed]:
    """A loader that keeps about two steps ready.

    Its generator is its own: the default draws from torch's global one, and every evaluation would
    then change the dropout of later steps.
    """
    ahead = -(-2 * sampler.rows.num_microbatches // workers) if workers else None
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
        prefetch_factor=ahead,
        persistent_workers=persistent and workers > 0,
        # Forked workers share the mapped files and need not import torch again (seconds).
        multiprocessing_context="fork" if workers else None,
    )


def collate(samples: Sequence[Sample]) -> Packed:
    """Rows to a micro-batch, in the worker.

    One plain array goes through the worker's pipe. Tensors would go through file descriptors that
    the worker must hand over itself, three switches of process for each micro-batch.
    """
    packed_3BS = np.empty((3, len(samples), len(samples[0]["tokens"])), dtype=np.int32)
    for row, sample in enumerate(samples):
        packed_3BS[0, row] = sample["tokens"]
        packed_3BS[1, row] = sample["labels"]
        packed_3BS[2, row] = sample["loss_mask"]
    return packed_3BS


def to_batch(packed_3BS: Packed) -> Batch:
    """What `collate` made, as tensors."""
    tokens_BS, labels_BS, mask_BS = torch.from_numpy(packed_3BS)
    return Batch(
        tokens_BS=tokens_BS.long(), labels_BS=labels_BS.long(), loss_mask_BS=mask_BS.float()
    )
