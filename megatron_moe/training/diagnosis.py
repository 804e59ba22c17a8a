"""Where a gradient that is not finite comes from: layer, samples, and whether it comes again.

Called once, by all ranks together, when a step has failed: its cost is another step. The forward
pass is repeated and every layer's output checked row by row, since one bad row makes the loss and
then every gradient NaN. Then the whole step is repeated: a norm that is finite the second time is a
sign of faulty hardware, one that is not, of the program or the data. Weights and optimizer state do
not change; random states do, so that dropout draws other numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.data.batch import Batch
from megatron_moe.model.layer import OpenMoELayer
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.step import count_targets, forward_function
from megatron_moe.training.whole_model import grad_norm

EMBEDDING, LOSS = -1, 1 << 30
"""Places before the first layer and after the last one."""
MOST_NAMED = 4
"""Layers that the description names."""


class _Outputs:
    """Whether each row of each output of a forward pass is finite, on this rank."""

    def __init__(self, run: TrainingRun) -> None:
        self._layout, self._dp_rank = run.ctx.layout, run.ctx.dp_rank
        self._passes: dict[nn.Module, int] = defaultdict(int)
        self._found: list[tuple[int, int, Tensor]] = []

    def record(self, place: int, module: nn.Module, output_SBH: Tensor) -> None:
        """Check one output [S, B, H]; its micro-batch is the number of passes of its module."""
        number = self._passes[module]
        self._passes[module] += 1
        self._found.append((place, number, output_SBH.detach().isfinite().all(2).all(0)))

    def bad(self) -> list[tuple[int, int]]:
        """Place and row of the global batch of every bad row; a host synchronization."""
        size, rows = self._layout.micro_batch_size, []
        for place, number, fine_B in self._found:
            first = (number * self._layout.dp + self._dp_rank) * size
            rows += [(place, first + row) for row, fine in enumerate(fine_B.tolist()) if not fine]
        return rows


@contextmanager
def _recorded(run: TrainingRun, outputs: _Outputs) -> Iterator[None]:
    """Record the outputs of embedding, layers and loss."""

    def hook(place: int) -> Any:
        def record(module: nn.Module, arguments: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if place == LOSS:  # [2, B, S]
                value = value.permute(2, 1, 0)
            outputs.record(place, module, value)

        return record

    handles = []
    for chunk in run.chunks:
        if chunk.pre_process:
            handles.append(chunk.embedding.register_forward_hook(hook(EMBEDDING)))
        if chunk.post_process:
            handles.append(chunk.register_forward_hook(hook(LOSS)))
        layers = (module for module in chunk.modules() if isinstance(module, OpenMoELayer))
        handles += [one.register_forward_hook(hook(one.layer_number - 1)) for one in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def diagnose(run: TrainingRun, batches: Sequence[Batch | None], first_sample: int) -> str:
    """Repeat a failed step and describe what is not finite; the same text on every rank.

    Args:
        run: the model, as it was before the step.
        batches: this rank's micro-batches of the step.
        first_sample: number of the first sample of its global batch.
    """
    outputs = _Outputs(run)
    targets = count_targets(batches, run) if run.has_loss else None
    with torch.no_grad(), _recorded(run, outputs):
        forward = forward_function(run, targets, len(batches))
        forward_backward(run.ctx, forward, batches, run.wrapped, forward_only=True)
    ranks = RankGroup(run.ctx.rank, run.ctx.world_size, run.ctx.platform.device)
    gathered = ranks.gather(outputs.bad())
    where = ranks.broadcast(None if gathered is None else _where(gathered, first_sample))
    return f"{where}; {_again(run, batches)}"


def _where(gathered: Sequence[Sequence[Sequence[int]]], first_sample: int) -> str:
    """For each sample the first place, and for each such place its ranks and samples."""
    first: dict[int, tuple[int, set[int]]] = {}
    for rank, entries in enumerate(gathered):
        for place, row in entries:
            known, ranks = first.get(row, (LOSS + 1, set()))
            if place < known:
                first[row] = (place, {rank})
            elif place == known:
                ranks.add(rank)
    if not first:
        return "repeated, the forward pass is finite in all layers"
    by_place: dict[int, tuple[set[int], list[int]]] = {}
    for row, (place, ranks) in sorted(first.items()):
        known_ranks, samples = by_place.setdefault(place, (set(), []))
        known_ranks |= ranks
        samples.append(first_sample + row)
    lines = [
        f"{_name(place)} for samples {_list(samples)} on ranks {_list(sorted(ranks))}"
        for place, (ranks, samples) in sorted(by_place.items())
    ]
    return f"the first output that is not finite is that of {', '.join(lines[:MOST_NAMED])}"


def _again(run: TrainingRun, batches: Sequence[Batch | None]) -> str:
    """Forward and backward once more: whether the norm is finite now."""
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    targets = count_targets(batches, run) if run.has_loss else None
    forward_backward(run.ctx, forward_function(run, targets, len(batches)), batches, run.wrapped)
    run.optimizer.prepare_grads()
    norm = grad_norm(run.optimizer, run.ctx.platform.device)
    if math.isfinite(norm):
        return f"repeated, the step has gradient norm {norm:.6g}: suspect the hardware"
    return f"repeated, the step has gradient norm {norm} again: not a transient fault"


def _name(place: int) -> str:
    if place == EMBEDDING:
        return "the embedding"
    return "the loss" if place == LOSS else f"layer {place}"


def _list(values: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
