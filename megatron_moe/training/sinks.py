"""Destinations of reports. To add a board, write a file of `training/boards/`.

`Sink` is what the trainer reports to. `BoardSink` is the base of those that plot numbers against
steps, TensorBoard, Weights & Biases and others: it decides which numbers, under which tags, and a
new one of them has four short methods. The tags are listed in docs/training.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import LoggingConfig
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.training.log import phase_change_lines
from megatron_moe.training.metrics import Evaluation, Interval, StepRecord, Summary
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.probe_statistics import LayerProbe, ProbeResult
from megatron_moe.training.run import TrainingRun


class Sink(Protocol):
    """A destination of reports. Methods are called on rank 0, in the order of the run's events.

    They run between two steps while the other ranks already take the next one, so they must not
    communicate, and what they spend adds to the time of that step.
    """

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """Model and data are built; ``state`` is where the run starts."""

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """A phase begins after the steps of ``state``, on ``data``."""

    def interval(self, interval: Interval) -> None:
        """Every `--log-interval` steps, and where a phase or the run ends."""

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """An evaluation after ``iteration`` steps; ``name`` is `validation` or `test`."""

    def probe(self, result: ProbeResult) -> None:
        """A probe of the routing, every `--routing-log-interval` steps."""

    def end(self, summary: Summary) -> None:
        """The last event; not called if an exception ends the run."""


class BoardSink(ABC):
    """Scalars of steps and layers, bars of expert load, and texts of phase changes.

    Args:
        logging: which steps, and which further numbers.
    """

    def __init__(self, logging: LoggingConfig) -> None:
        self._logging = logging

    @abstractmethod
    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Scalars by tag. Steps never decrease, but one may come several times."""

    @abstractmethod
    def add_bars(self, tag: str, values: Sequence[float], iteration: int) -> None:
        """A bar for each position."""

    @abstractmethod
    def add_text(self, tag: str, text: str, iteration: int) -> None:
        """A text in Markdown."""

    @abstractmethod
    def close(self) -> None:
        """Write everything; nothing follows."""

    def start(  # noqa: B027 (a board may have something to show at the start, or not)
        self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState
    ) -> None:
        """Nothing: the log shows the configuration."""

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """The changes as a text, and the number of the phase, at its first step."""
        lines = phase_change_lines(before, after, data, state)
        text = "\n".join(f"- {line.strip()}" for line in lines)
        self.add_text("stage", text, state.iteration + 1)
        self.add({"train/stage": float(after.number)}, state.iteration + 1)

    def interval(self, interval: Interval) -> None:
        """Losses and rates of each step; speed, memory, times and routing once."""
        for record in interval.records:
            if record.iteration % self._logging.tensorboard_log_interval == 0:
                self.add(_step_values(record), record.iteration)
        last = interval.records[-1]
        self.add(_interval_values(interval, self._logging), last.iteration)
        for number, layer in interval.layers.items():
            prefix = f"moe/layer {number:02d}"
            values = {f"{prefix}/{tag}": value for tag, value in _layer_values(layer).items()}
            if interval.buffer_factor is not None:
                values[f"{prefix}/overflowed choices"] = layer.dropped_choices
            self.add(values, last.iteration)
            self.add_bars(f"{prefix}/load per expert", layer.load, last.iteration)
            # A part of a row without tokens has no rate; its bar is empty.
            drops = [rate or 0.0 for rate in layer.drop_rate_by_position]
            self.add_bars(f"{prefix}/drop rate by position", drops, last.iteration)

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """`{name}/lm loss`, its perplexity, and `{name}/lm loss of {domain}`."""
        values = {f"{name}/lm loss": result.lm_loss, f"{name}/perplexity": result.perplexity}
        for domain, part in result.domains.items():
            values[f"{name}/lm loss of {domain}"] = part.lm_loss
        self.add(values, iteration)

    def probe(self, result: ProbeResult) -> None:
        """Agreements, shares of the token id and drift by layer; bars by layer and domain."""
        for number, layer in result.layers.items():
            prefix = f"moe/layer {number:02d}"
            values = {f"{prefix}/{tag}": value for tag, value in _probe_values(layer).items()}
            self.add(values, result.iteration)
            for name, shares in zip(result.domains, layer.domain_shares, strict=True):
                tag = f"{prefix}/share per expert" + (f" of {name}" if name else "")
                self.add_bars(tag, shares, result.iteration)

    def end(self, summary: Summary) -> None:
        """Write everything."""
        self.close()


def _step_values(record: StepRecord) -> dict[str, float]:
    values = {
        "train/lm loss": record.lm_loss,
        "train/grad norm": record.grad_norm,
        "train/learning rate": record.learning_rate,
        "train/logit z": record.logit_z,
    }
    if record.zeros_in_grad is not None:
        values["train/num zeros"] = float(record.zeros_in_grad)
    if record.params_norm is not None:
        values["train/params norm"] = record.params_norm
    return values


def _interval_values(interval: Interval, logging: LoggingConfig) -> dict[str, float]:
    """The scalars of an interval by tag."""
    last, speed = interval.records[-1], interval.speed
    values = {
        "train/consumed samples": float(last.consumed_samples),
        "train/batch size": float(last.batch_size),
        "speed/tokens per second": speed.tokens_per_second,
        "speed/model TFLOPs per device": speed.tflops_per_device,
        "speed/seconds per step": speed.seconds_per_step,
        "memory/max allocated MiB": speed.memory_bytes / 2**20,
    }
    if interval.phase is not None:
        values["train/stage"] = float(interval.phase.number)
    if speed.mfu is not None:
        values["speed/MFU"] = speed.mfu
    if speed.done_tflops_per_device is not None:
        values["speed/done TFLOPs per device"] = speed.done_tflops_per_device
    if speed.done_mfu is not None:
        values["speed/MFU of done arithmetic"] = speed.done_mfu
    if logging.log_memory_to_tensorboard:
        values["memory/allocated MiB"] = speed.allocated_bytes / 2**20
        values["memory/reserved MiB"] = speed.reserved_bytes / 2**20
    if logging.log_timers_to_tensorboard:
        for name, (least, most) in interval.timers.items():
            values |= {f"timers/{name}": most, f"timers/{name} least": least}
    return values


def _layer_values(layer: LayerStatistics) -> dict[str, float]:
    """The scalars of one MoE layer, by the end of their tag; no value for rates without tokens."""
    values: dict[str, float | None] = {
        "max over mean load": layer.max_over_mean_load,
        "MaxVio": layer.max_violation,
        "dead experts": float(layer.dead_experts),
        "drop rate": layer.drop_rate,
        "drop rate of real tokens": layer.drop_rate_of_real,
        "drop rate of padding": layer.drop_rate_of_padding,
        "tokens": layer.tokens,
        "kept choices": layer.kept_choices,
        "dropped choices": layer.dropped_choices,
        "router entropy": layer.router_entropy,
        "router confidence": layer.router_confidence,
        "router logit RMS": layer.logit_rms,
        "load balancing loss": layer.aux_loss,
        "router z loss": layer.z_loss,
    }
    for number, loss in enumerate(layer.further_aux_losses, 2):
        values[f"load balancing loss {number}"] = loss
    for rank, rate in enumerate(layer.drop_rate_by_choice, 1):
        values[f"drop rate of choice {rank}"] = rate
    return {tag: value for tag, value in values.items() if value is not None}


def _probe_values(layer: LayerProbe) -> dict[str, float]:
    """The scalars of one MoE layer at a probe, by the end of their tag."""
    values = {
        "router logit drift": layer.logit_drift,
        "token id share": layer.token_share,
        "token id share by chance": layer.token_share_chance,
    }
    for name, same in (("previous", layer.previous), ("first", layer.first)):
        if same is not None:
            values[f"agreement with {name} probe"] = same.choices
            values[f"top-1 agreement with {name} probe"] = same.top1
    return {tag: value for tag, value in values.items() if value is not None}
