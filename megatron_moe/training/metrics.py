"""What a run measures: per-step losses without host reads, and the interval's report.

Steps leave their sums on the device. At a log interval they are added over all ranks in one
collective, read once, and turned into a `Report`; a `Meter` knows which steps are still unread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint import TrainState
from megatron_moe.platform import Platform


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as exact as it was computed."""

    iteration: int
    """Steps done, this one included."""
    consumed_samples: int
    """Sequences read so far, this step's included."""
    batch_size: int
    """Sequences of this step."""
    learning_rate: float
    """Learning rate of the update."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    lm_loss: float
    """Cross entropy in nats, mean over the global batch's targets."""
    logit_z: float
    """Mean of (log Z)^2 over the same targets, unweighted."""
    targets: int
    """Real targets of the global batch."""

    def to_json(self) -> dict[str, float | int | str]:
        """For `--metrics-file`: numbers to read, and hexadecimal floats to compare bit by bit."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lm_loss": self.lm_loss,
            "logit_z": self.logit_z,
            "grad_norm": self.grad_norm,
            "targets": self.targets,
            "lm_loss_hex": self.lm_loss.hex(),
            "grad_norm_hex": self.grad_norm.hex(),
        }


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast an interval was. Evaluation and saving are not counted."""

    seconds_per_step: float
    """Mean wall time of a step."""
    tokens_per_second: float
    """Positions per second, over all ranks."""
    tflops_per_device: float
    """Model TFLOP/s of one rank: the arithmetic that the model needs, recomputation not counted."""
    mfu: float | None
    """That as a share of the device's peak; ``None`` if the peak is not known."""
    memory_bytes: int
    """Most memory in use on this rank so far."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on held-out data."""

    lm_loss: float
    """Cross entropy in nats: its sum over all targets, divided by their number."""
    targets: int
    """Real targets it was taken over."""
    domains: Mapping[str, Evaluation] = field(default_factory=dict)
    """The same of each domain by itself, in order; empty if there is but one."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss, kept within a float."""
        return math.exp(min(self.lm_loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """For `--metrics-file`, with hexadecimal floats like those of steps."""
        values: dict[str, Any] = {
            "lm_loss": self.lm_loss,
            "targets": self.targets,
            "lm_loss_hex": self.lm_loss.hex(),
        }
        if self.domains:
            values["domains"] = {name: part.to_json() for name, part in self.domains.items()}
        return values


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a start of a run ended."""

    state: TrainState
    """Where it stands now."""
    first: StepRecord | None
    """Its first step, ``None`` if there was nothing left to do."""
    last: StepRecord | None
    """Its last step."""
    valid: Evaluation | None
    """Its last evaluation on validation data."""
    tokens_per_second: float
    """Over all its steps, evaluations and saves not counted."""
    failure: str | None = None
    """Why it stopped before its end, in one line."""


_Step = tuple[int, int, int, float, float]
"""Iteration, consumed samples, batch size, learning rate, gradient norm."""


@dataclass
class Meter:
    """Collects steps between two log intervals.

    Args:
        platform: where we run.
        tokens_per_sample: positions of one sequence.
        flops_per_token: model FLOPs of one position.
        world_size: ranks.
        peak_tflops: of one device, ``None`` if unknown.
    """

    platform: Platform
    tokens_per_sample: int
    flops_per_token: float
    world_size: int
    peak_tflops: float | None
    _steps: list[_Step] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)
    _seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def add(
        self,
        iteration: int,
        samples: int,
        batch_size: int,
        learning_rate: float,
        grad_norm: float,
        sums: Tensor,
    ) -> None:
        """Note a step; ``sums`` is this rank's fp64 [3] of `total_sums`, left on the device."""
        self._steps.append((iteration, samples, batch_size, learning_rate, grad_norm))
        self._sums.append(sums)

    def pause(self) -> None:
        """Stop the clock, for an evaluation or a save."""
        self.platform.synchronize()
        self._seconds += time.perf_counter() - self._started

    def resume(self) -> None:
        """Start the clock again."""
        self._started = time.perf_counter()

    def collect(self) -> tuple[list[StepRecord], Throughput | None]:
        """Read everything noted since the last time; a collective over all ranks.

        The clock starts anew. Without a step in between there is nothing, and no throughput.
        """
        self.pause()
        self.resume()
        steps, seconds = self._steps, self._seconds
        records = _records(steps, self._sums)
        self._steps, self._sums, self._seconds = [], [], 0.0
        if not steps:
            return [], None
        return records, self._throughput(records, seconds)

    def _throughput(self, records: Sequence[StepRecord], seconds: float) -> Throughput:
        tokens = sum(record.batch_size for record in records) * self.tokens_per_sample
        tflops = self.flops_per_token * tokens / seconds / self.world_size / 1e12
        return Throughput(
            seconds_per_step=seconds / len(records),
            tokens_per_second=tokens / seconds,
            tflops_per_device=tflops,
            mfu=tflops / self.peak_tflops if self.peak_tflops else None,
            memory_bytes=self.platform.device_memory_stats()["max_allocated"],
        )


def _records(steps: Sequence[_Step], sums: Sequence[Tensor]) -> list[StepRecord]:
    if not steps:
        return []
    table = torch.stack(list(sums))
    torch.distributed.all_reduce(table)
    return [
        StepRecord(
            iteration=iteration,
            consumed_samples=samples,
            batch_size=batch_size,
            learning_rate=rate,
            grad_norm=norm,
            lm_loss=cross_entropy / max(targets, 1.0),
            logit_z=log_z / max(targets, 1.0),
            targets=int(targets),
        )
        for (iteration, samples, batch_size, rate, norm), (cross_entropy, log_z, targets) in zip(
            steps, table.tolist(), strict=True
        )
    ]


def mean_loss(records: Sequence[StepRecord]) -> float:
    """The interval's cross entropy, each target weighing the same."""
    return math.fsum(r.lm_loss * r.targets for r in records) / max(
        sum(r.targets for r in records), 1
    )
