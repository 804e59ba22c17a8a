"""What a run measures: steps, intervals, evaluations, and the meter that collects them.

Steps leave their loss sums on the device. At a log interval the `Meter` reduces the sums of all
steps since the last one over all ranks, in one collective and one host synchronization, and turns
them into `StepRecord`s. Reading them step by step would cost a synchronization each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import RunConfig
from megatron_moe.model.counting import TokenFlops, flops_per_token
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.training.phases import Phase
from megatron_moe.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, in full precision."""

    iteration: int
    """Completed steps, this one included."""
    consumed_samples: int
    """Sequences consumed so far, this step's included."""
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
    zeros_in_grad: int | None = None
    """Elements of the gradient that are exactly 0; with `--log-num-zeros-in-grad`."""
    params_norm: float | None = None
    """Norm of all parameters after the update; with `--log-params-norm`."""
    spike: str | None = None
    """The policy that was applied, if the step was a loss spike (`--loss-spike-policy`)."""

    def to_json(self) -> dict[str, float | int | str]:
        """For `--metrics-file`: readable numbers, and hexadecimal floats to compare bit by bit."""
        values: dict[str, float | int | str] = {
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
        if self.zeros_in_grad is not None:
            values["num_zeros"] = self.zeros_in_grad
        if self.params_norm is not None:
            values["params_norm"] = self.params_norm
        if self.spike is not None:
            values["loss_spike"] = self.spike
        return values


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Training FLOPs of an interval over all ranks, for tokens that are not padding.

    Matrix products, forward and backward, without recomputation (`model/counting.py`).
    """

    tokens: int
    """Positions that are not padding."""
    asked: float
    """What the model asks for: all K choices of every token."""
    done: float
    """What was done: choices without a slot are computed by no expert."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The speed of an interval. Evaluations and saves are not counted."""

    seconds_per_step: float
    """Mean wall time of a step."""
    tokens_per_second: float
    """Positions per second, over all ranks."""
    tflops_per_device: float
    """Model TFLOP/s of one rank: the arithmetic that the model asks for, without recomputation; of
    a model with MoE layers without padding, see `Arithmetic`."""
    mfu: float | None
    """Model FLOP/s utilization: `tflops_per_device` over the device's peak; ``None`` if the peak is
    not known."""
    memory_bytes: int
    """Peak memory of this rank so far."""
    done_tflops_per_device: float | None = None
    """The same with the arithmetic that was done; ``None`` without MoE layers."""
    done_mfu: float | None = None
    """`done_tflops_per_device` over the device's peak."""
    arithmetic: Arithmetic | None = None
    """Of the interval; ``None`` without MoE layers, which count padding and drops."""
    allocated_bytes: int = 0
    """Memory of this rank that tensors hold now."""
    reserved_bytes: int = 0
    """Memory of this rank that the allocator holds now."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The steps since the last log line."""

    records: Sequence[StepRecord]
    """At least one, oldest first."""
    speed: Throughput
    layers: Mapping[int, LayerStatistics]
    """Routing statistics by 0-based layer number; empty for a dense model."""
    phase: Phase | None
    """The phase of the last step; ``None`` for a run without a phase table."""
    timers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Seconds of a step by timer, least and most over the ranks; see `timing.StepTimers`."""
    forced_routing: bool = False
    """Whether experts were chosen at random (`--moe-router-force-load-balancing`)."""
    buffer_factor: float | None = None
    """The bound of expert buffers (`--moe-dropless-buffer-factor`): choices that were dropped are
    those past it."""

    @property
    def lm_loss(self) -> float:
        """Cross entropy in nats, mean over all targets of the interval."""
        # A mean over steps would weigh the targets of a small batch more than those of a large one.
        total = math.fsum(record.lm_loss * record.targets for record in self.records)
        return total / max(sum(record.targets for record in self.records), 1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on held-out data."""

    lm_loss: float
    """Cross entropy in nats: its sum over all targets, divided by their number."""
    targets: int
    """Real targets of the evaluation."""
    domains: Mapping[str, Evaluation] = field(default_factory=dict)
    """The same for each domain separately, in order; empty if there is only one."""

    @property
    def perplexity(self) -> float:
        """Exponential of the loss, limited to the range of a float."""
        return math.exp(min(self.lm_loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """For `--metrics-file`, with hexadecimal floats as for steps."""
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
    """The result of `Trainer.train`: one start of a run."""

    state: TrainState
    """Step and samples at its end."""
    first: StepRecord | None
    """Its first step; ``None`` if no step was left to take."""
    last: StepRecord | None
    """Its last step."""
    valid: Evaluation | None
    """Its last evaluation on validation data."""
    tokens_per_second: float
    """Over all its steps; evaluations and saves are not counted."""
    failure: str | None = None
    """Why it ended early, in one line; ``None`` if it did not fail."""


_Step = tuple[int, int, int, float, float]
"""Iteration, consumed samples, batch size, learning rate, gradient norm."""


class Meter:
    """Collects steps between two log intervals, and their sum over this start of the run.

    Args:
        run: the model; its arithmetic and the device's peak give the utilization.
    """

    def __init__(self, run: TrainingRun) -> None:
        config, platform = run.config, run.ctx.platform
        self._platform, self._world_size = platform, run.ctx.world_size
        self._vocab_size = run.vocab_size
        self._peak_tflops = config.logging.device_peak_tflops or platform.peak_tflops(
            config.train.bf16
        )
        self._steps: list[_Step] = []
        self._sums: list[Tensor] = []
        self._zeros: list[Tensor | None] = []
        self._squares: list[Tensor | None] = []
        self._seconds = 0.0
        self._started = time.perf_counter()
        self.first: StepRecord | None = None
        self.last: StepRecord | None = None
        self._all_seconds, self._all_tokens = 0.0, 0
        self.enter_phase(config)

    def enter_phase(self, config: RunConfig) -> None:
        """Count tokens and arithmetic as in this phase, whose sequence length may be another.

        Steps of the phase before must have been collected: they would be counted wrongly.
        """
        self._sequence_length = config.data.seq_length
        flops = flops_per_token(config.model, config.moe, self._vocab_size, self._sequence_length)
        self._flops = flops

    def add(
        self,
        iteration: int,
        samples: int,
        batch_size: int,
        learning_rate: float,
        grad_norm: float,
        sums: Tensor,
        zeros: Tensor | None = None,
        params_square: Tensor | None = None,
    ) -> None:
        """Add a step, whose tensors are left on the device.

        Args:
            iteration: number of the step, from 1.
            samples: sequences consumed so far.
            batch_size: sequences of the step.
            learning_rate: of its update.
            grad_norm: of the whole model.
            sums: this rank's fp64 [3] of `total_sums`.
            zeros: of `StepResult`.
            params_square: of `StepResult`.
        """
        self._steps.append((iteration, samples, batch_size, learning_rate, grad_norm))
        self._sums.append(sums)
        self._zeros.append(zeros)
        self._squares.append(params_square)

    def pause(self) -> None:
        """Stop the clock, for an evaluation or a save."""
        # Kernels that were launched before belong to the steps before.
        self._platform.synchronize()
        self._seconds += time.perf_counter() - self._started

    def resume(self) -> None:
        """Start the clock again."""
        self._started = time.perf_counter()

    def with_routing(self, speed: Throughput, layers: Mapping[int, LayerStatistics]) -> Throughput:
        """The speed with arithmetic as the MoE layers counted it: without padding, with drops.

        Args:
            speed: from `collect`, which counts every position with all K choices.
            layers: statistics of the same steps.
        """
        if not layers:
            return speed
        tokens, done = count_arithmetic(self._flops, layers.values())
        positions = next(iter(layers.values())).positions
        asked, whole = tokens * self._flops.training, positions * self._flops.training
        tflops = speed.tflops_per_device * asked / whole
        done_tflops = speed.tflops_per_device * done / whole
        peak = self._peak_tflops
        return replace(
            speed,
            tflops_per_device=tflops,
            mfu=tflops / peak if peak else None,
            done_tflops_per_device=done_tflops,
            done_mfu=done_tflops / peak if peak else None,
            arithmetic=Arithmetic(tokens=int(tokens), asked=asked, done=done),
        )

    @property
    def tokens_per_second(self) -> float:
        """Over all collected steps; 0 without any."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0

    def collect(self) -> tuple[list[StepRecord], Throughput | None]:
        """Read all steps since the last call; a collective over all ranks if there are any.

        The clock restarts. Without a step there are no records and no throughput.
        """
        self.pause()
        self.resume()
        steps, seconds = self._steps, self._seconds
        records = _records(steps, self._sums)
        zeros, squares = _read(self._zeros), _read(self._squares)
        records = [
            replace(
                record,
                zeros_in_grad=None if zero is None else int(zero),
                params_norm=None if square is None else math.sqrt(square),
            )
            for record, zero, square in zip(records, zeros, squares, strict=True)
        ]
        self._steps, self._sums, self._seconds = [], [], 0.0
        self._zeros, self._squares = [], []
        if not steps:
            return [], None
        speed = self._throughput(records, seconds)
        self.first, self.last = self.first or records[0], records[-1]
        self._all_seconds += speed.seconds_per_step * len(records)
        self._all_tokens += self._tokens(records)
        return records, speed

    def _tokens(self, records: Sequence[StepRecord]) -> int:
        return sum(record.batch_size for record in records) * self._sequence_length

    def _throughput(self, records: Sequence[StepRecord], seconds: float) -> Throughput:
        tokens = self._tokens(records)
        tflops = self._flops.training * tokens / seconds / self._world_size / 1e12
        memory = self._platform.device_memory_stats()
        return Throughput(
            seconds_per_step=seconds / len(records),
            tokens_per_second=tokens / seconds,
            tflops_per_device=tflops,
            mfu=tflops / self._peak_tflops if self._peak_tflops else None,
            memory_bytes=memory["max_allocated"],
            allocated_bytes=memory["allocated"],
            reserved_bytes=memory["reserved"],
        )


def count_arithmetic(flops: TokenFlops, layers: Collection[LayerStatistics]) -> tuple[float, float]:
    """Tokens that are not padding, and the training FLOPs that were done for them.

    Args:
        flops: of one token.
        layers: statistics of all MoE layers over the same passes; at least one.
    """
    counted = [sum(layer.tokens_at[0]) for layer in layers]
    kept = sum(sum(map(sum, layer.kept_at[0])) for layer in layers)
    choices = sum(counted) * next(iter(layers)).topk
    tokens = counted[0]
    return tokens, tokens * flops.training_with_drops(kept / choices if choices else 1.0)


def _read(values: Sequence[Tensor | None]) -> list[float | None]:
    """Scalars of the device, all in one read where they were logged, else `None`."""
    present = [value for value in values if value is not None]
    if len(present) < len(values) or not present:
        return [None] * len(values)
    numbers: list[float | None] = torch.stack(present).tolist()
    return numbers


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
