"""Which rows of the order a rank reads, and the workers that read them ahead of time.

B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_moe.data.batch import PLANES, Batch
from megatron_moe.data.causal import Sample

Packed = npt.NDArray[np.int32]
"""A micro-batch [3, B, S]: tokens, labels, and a mask of 0 and 1; then its extra planes, if any."""


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


def build_loader(
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
    # A blend says of each sample which source it is of; nobody asks.
    planes = [name for name in PLANES if name in samples[0]]
    packed_PBS = np.empty((len(planes), len(samples), len(samples[0]["tokens"])), dtype=np.int32)
    for row, sample in enumerate(samples):
        for plane, name in enumerate(planes):
            packed_PBS[plane, row] = sample[name]
    return packed_PBS


def to_batch(packed_PBS: Packed, extra: Sequence[str] = ()) -> Batch:
    """What `collate` made, as tensors.

    Args:
        packed_PBS: tokens, labels, mask and what else samples hold, in this order.
        extra: names of the planes after the third; see `batch.extra_planes`.
    """
    tokens_BS, labels_BS, mask_BS, *planes = torch.from_numpy(packed_PBS)
    return Batch(
        tokens_BS=tokens_BS.long(),
        labels_BS=labels_BS.long(),
        loss_mask_BS=mask_BS.float(),
        **{f"{name}_BS": plane.long() for name, plane in zip(extra, planes, strict=True)},
    )
