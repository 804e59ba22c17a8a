"""The order in which a pipeline stage runs its micro-batches: 1F1B, or interleaved 1F1B.

As Megatron-Core 0.16.1 (`core/pipeline_parallel/schedules.py`): a number of forward passes, then
one forward and one backward pass in turns, then the remaining backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of one micro-batch through one model chunk."""

    backward: bool
    micro_batch: int
    chunk: int


def warmup_passes(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Forward passes of a stage before its first backward pass, besides the one right before it."""
    if stages == 1:
        return 0
    if chunks == 1:
        return min(stages - stage - 1, micro_batches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages, micro_batches * chunks)


def passes_of(stage: int, stages: int, chunks: int, micro_batches: int) -> Iterator[Pass]:
    """The passes of a stage in order.

    Args:
        stage: from 0.
        stages: P.
        chunks: model chunks of the stage.
        micro_batches: M; with several chunks, a multiple of P.
    """
    order = list(_forward_order(stages, chunks, micro_batches))
    total, warmup = len(order), warmup_passes(stage, stages, chunks, micro_batches)
    for index in range(total + warmup):
        if index < total:
            yield Pass(False, *order[index])
        if index >= warmup:
            micro_batch, chunk = order[index - warmup]
            yield Pass(True, micro_batch, chunks - 1 - chunk)


def _forward_order(stages: int, chunks: int, micro_batches: int) -> Iterator[tuple[int, int]]:
    """Micro-batches in groups of P: each group through all chunks before the next group."""
    for first in range(0, micro_batches, stages):
        for chunk in range(chunks):
            for micro_batch in range(first, min(first + stages, micro_batches)):
                yield micro_batch, chunk
