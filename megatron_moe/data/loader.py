"""Which samples a rank reads, and the worker processes that read them ahead of time.

Step s of a run uses samples [s G, (s + 1) G) of the blended order, with the global batch size
G = B M DP. Micro-batch m of data-parallel rank r takes the B samples from (m DP + r) B on, counted
from the start of the step. Example, B = 2, M = 2, DP = 2, so G = 8:

    micro-batch   rank 0   rank 1
    0             0 1      2 3
    1             4 5      6 7

The samples of a step are therefore the same in every layout, and a run that resumes after n samples
resumes at sample n, whatever its layout is then.

B sequences of a micro-batch, M micro-batches of a step, S tokens of a sequence, P planes of a
micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_moe.data.batch import PLANES, Batch
from megatron_moe.data.causal import Sample
from megatron_moe.platform.signals import end_workers_at_exit, exit_signals_blocked
from megatron_moe.processes import end_with_parent

_HELD = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP}
Packed = npt.NDArray[np.int32]
"""A micro-batch [P, B, S]: tokens, labels, a mask of 0 and 1, then the extra planes."""


@dataclass(frozen=True, kw_only=True)
class BatchShard:
    """The part of every global batch that one data-parallel rank reads."""

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

    def __init__(self, shard: BatchShard, start: int, stop: int) -> None:
        self.shard, self.start = shard, start
        self.steps = max(stop - start, 0) // shard.global_batch_size

    def __len__(self) -> int:
        return self.steps * self.shard.num_microbatches

    def __iter__(self) -> Iterator[list[int]]:
        size = self.shard.micro_batch_size
        first = self.start + self.shard.dp_rank * size
        for _ in range(len(self)):
            yield list(range(first, first + size))
            first += size * self.shard.dp_size


class WorkerTimeoutError(RuntimeError):
    """Worker processes have not returned a micro-batch in time."""


def build_loader(
    dataset: Dataset[Any],
    sampler: MicroBatchSampler,
    workers: int,
    persistent: bool,
    timeout: float = 0,
) -> DataLoader[Packed]:
    """Return a loader that keeps about two steps ready.

    It has a generator of its own: the default draws from torch's global one, so that every
    evaluation would change the dropout of later steps.

    Args:
        dataset: samples by number.
        sampler: which of them this rank reads.
        workers: worker processes; 0 reads in this one.
        persistent: whether they stay between two iterations.
        timeout: seconds after which a micro-batch that the workers have not returned is a
            `WorkerTimeoutError`; 0 waits for ever, as does a loader without workers.
    """
    ahead = -(-2 * sampler.shard.num_microbatches // workers) if workers else None
    return _Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
        prefetch_factor=ahead,
        persistent_workers=persistent and workers > 0,
        timeout=timeout if workers else 0,
        # Forked workers share the mapped files and do not import torch again, which takes seconds.
        multiprocessing_context="fork" if workers else None,
    )


class _Loader(DataLoader[Packed]):
    """A loader whose workers end with this process, and by no signal that asks the run to exit."""

    def __iter__(self) -> Any:
        end_workers_at_exit()
        # Workers end with the thread that starts them: the others may be over before their loader.
        if threading.current_thread() is threading.main_thread():
            self.worker_init_fn = functools.partial(_end_with, os.getpid())
        with exit_signals_blocked():  # starts the workers
            batches = super().__iter__()
        return _in_time(batches, self.timeout) if self.timeout else batches


def _end_with(parent: int, _worker: int) -> None:
    end_with_parent(parent)


def _in_time(batches: Iterator[Packed], seconds: float) -> Iterator[Packed]:
    """The same micro-batches; an error names the workers that do not return any."""
    while True:
        try:
            packed_PBS = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise WorkerTimeoutError(
                f"data-loader workers have not returned a micro-batch for {seconds:g} seconds"
                f" (--data-loader-timeout){_stopped_workers()}"
            ) from None
        yield packed_PBS


def _stopped_workers() -> str:
    """Process ids of workers that do not run, as the end of a message."""
    states = {}
    for worker in multiprocessing.active_children():
        with contextlib.suppress(psutil.Error):
            states[worker.pid] = psutil.Process(worker.pid).status()
    found = [f"{pid} is {state}" for pid, state in states.items() if state in _HELD]
    return f"; process {', '.join(found)}" if found else "; all of them run"


def collate(samples: Sequence[Sample]) -> Packed:
    """Pack samples into a micro-batch, in the worker.

    A single plain array goes through the worker's pipe. Tensors would be sent as file descriptors
    that the worker must hand over itself, three process switches for each micro-batch.
    """
    # A blend adds to each sample the number of its source, which is not part of a batch.
    planes = [name for name in PLANES if name in samples[0]]
    packed_PBS = np.empty((len(planes), len(samples), len(samples[0]["tokens"])), dtype=np.int32)
    for row, sample in enumerate(samples):
        for plane, name in enumerate(planes):
            packed_PBS[plane, row] = sample[name]
    return packed_PBS


def to_batch(packed_PBS: Packed, extra: Sequence[str] = ()) -> Batch:
    """Convert the output of `collate` to tensors.

    Args:
        packed_PBS: tokens, labels, mask and extra planes, in this order.
        extra: names of the extra planes; see `batch.extra_planes`.
    """
    tokens_BS, labels_BS, mask_BS, *planes = torch.from_numpy(packed_PBS)
    return Batch(
        tokens_BS=tokens_BS.long(),
        labels_BS=labels_BS.long(),
        loss_mask_BS=mask_BS.float(),
        **{f"{name}_BS": plane.long() for name, plane in zip(extra, planes, strict=True)},
    )
