"""The forward and backward passes of a step as one CUDA graph (`--cuda-graph full`).

A graph repeats what the device did while it was captured, without the host: no Python runs, and
every tensor has the memory that it had. So micro-batches are copied into the memory of the captured
ones before each step, and what a step leaves behind (sums of losses, gradients, statistics of
routing) is in memory that the next step overwrites. Captured are all micro-batches and the
reduction of gradients; the update is not: it reads the norm of the gradient.

The first steps run as they are: they compile kernels and set up communicators, which a capture
cannot. `config/graph.py` has what cannot be captured at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.errors import UsageError
from megatron_moe.moe.statistics import counters

T = TypeVar("T")
Passes = Callable[[Sequence[Batch | None], Tensor | None], T]
"""Forward and backward of micro-batches, with the targets of the global batch."""

WARM_UP = 3
"""Steps before the capture, as in Megatron-Core (`cuda_graph_warmup_steps`)."""


class Recording(Protocol):
    """Work of a device that can be repeated."""

    def record(self, work: Callable[[], None]) -> None:
        """Note what ``work`` does, which need not happen now."""

    def replay(self) -> None:
        """Do it."""


class CudaRecording:
    """A CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], None]) -> None:
        """Capture; nothing is computed."""
        torch.cuda.synchronize()
        # NCCL's watchdog asks for events in a thread of its own, which must not end the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work()
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


def check_device(config: RunConfig, device_type: str) -> None:
    """Whether the device can capture what `--cuda-graph` asks for.

    Raises:
        UsageError: it cannot.
    """
    if config.parallel.cuda_graph != "none" and device_type != "cuda":
        requested = config.parallel.cuda_graph
        raise UsageError("--cuda-graph", requested, "none without a CUDA device")


class CapturedPasses:
    """Runs the passes of a step, from the capture on by repeating the captured ones.

    Args:
        new_recording: makes the graph.
        warm_up: steps before the capture.
    """

    def __init__(
        self, new_recording: Callable[[], Recording] = CudaRecording, warm_up: int = WARM_UP
    ) -> None:
        self._new_recording, self._left = new_recording, warm_up
        self._recording: Recording | None = None
        self._batches: Sequence[Batch | None] = ()
        self._targets: Tensor | None = None
        self._results: list[Any] = []

    def run(self, batches: Sequence[Batch | None], targets: Tensor | None, passes: Passes[T]) -> T:
        """The result of ``passes``; from the capture on, in memory that the next step overwrites.

        Args:
            batches: of the step; as many as ever, of the same shapes.
            targets: of the global batch.
            passes: called in the first steps, and once for the capture.
        """
        if self._left > 0:
            self._left -= 1
            return passes(batches, targets)
        if self._recording is None:
            self._batches = [None if batch is None else _copy(batch) for batch in batches]
            self._targets = None if targets is None else targets.clone()
            self._recording = self._new_recording()
            self._recording.record(
                lambda: self._results.append(passes(self._batches, self._targets))
            )
        for kept, batch in zip(self._batches, batches, strict=True):
            if kept is not None and batch is not None:
                _load(kept, batch)
        if self._targets is not None and targets is not None:
            self._targets.copy_(targets)
        self._recording.replay()
        result: T = self._results[0]
        return result


def _planes(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    every = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: plane for name, plane in every.items() if plane is not None}


def _copy(batch: Batch) -> Batch:
    return replace(batch, **{name: plane.clone() for name, plane in _planes(batch).items()})


def _load(kept: Batch, batch: Batch) -> None:
    """Copy a batch into the memory of another one."""
    new = _planes(batch)
    for name, plane in _planes(kept).items():
        plane.copy_(new[name])


def count_at_once(chunks: Iterable[nn.Module]) -> None:
    """Let the device add up statistics in each pass: the host takes no part in a replay."""
    for counter in counters(chunks).values():
        counter.most_pending = 1
