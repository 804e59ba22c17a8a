"""TensorBoard (`--tensorboard-dir`). The tags are listed in docs/training.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.tensorboard import SummaryWriter

from megatron_moe.checkpoint import TrainState
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.text import printable
from megatron_moe.training.log import phase_change_lines
from megatron_moe.training.metrics import Evaluation, Interval, StepRecord, Summary
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.run import TrainingRun


class TensorBoardSink:
    """Writes scalars of steps and layers, histograms of expert load, and texts of phase changes.

    Args:
        directory: of the event files.
        first_iteration: TensorBoard hides the points of later steps in older event files.
    """

    def __init__(self, directory: str, first_iteration: int) -> None:
        self._board = SummaryWriter(directory, purge_step=first_iteration + 1)

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """Nothing: the log shows the configuration."""

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """The changes as a text, and the number of the phase, at its first step."""
        lines = phase_change_lines(before, after, data, state)
        text = "\n".join(f"- {line.strip()}" for line in lines)
        self._board.add_text("stage", printable(text), state.iteration + 1)
        self._board.add_scalar("train/stage", after.number, state.iteration + 1)

    def interval(self, interval: Interval) -> None:
        """Losses and rates of each step; speed and routing once for the interval."""
        for record in interval.records:
            self._step_scalars(record)
        last = interval.records[-1]
        for tag, value in _interval_values(interval).items():
            self._board.add_scalar(tag, value, last.iteration)
        for number, layer in interval.layers.items():
            self._layer_scalars(number, layer, last.iteration)

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """`{name}/lm loss`, its perplexity, and `{name}/lm loss of {domain}`."""
        self._board.add_scalar(f"{name}/lm loss", result.lm_loss, iteration)
        self._board.add_scalar(f"{name}/perplexity", result.perplexity, iteration)
        for domain, part in result.domains.items():
            tag = f"{name}/lm loss of {printable(domain)}"
            self._board.add_scalar(tag, part.lm_loss, iteration)

    def end(self, summary: Summary) -> None:
        """Flush and close the event file."""
        self._board.close()

    def _step_scalars(self, record: StepRecord) -> None:
        self._board.add_scalar("train/lm loss", record.lm_loss, record.iteration)
        self._board.add_scalar("train/grad norm", record.grad_norm, record.iteration)
        self._board.add_scalar("train/learning rate", record.learning_rate, record.iteration)
        self._board.add_scalar("train/logit z", record.logit_z, record.iteration)

    def _layer_scalars(self, number: int, layer: LayerStatistics, iteration: int) -> None:
        prefix = f"moe/layer {number:02d}"
        for tag, value in _layer_values(layer).items():
            self._board.add_scalar(f"{prefix}/{tag}", value, iteration)
        _add_bars(self._board, f"{prefix}/load per expert", layer.load, iteration)


def _interval_values(interval: Interval) -> dict[str, float]:
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
    return values


def _layer_values(layer: LayerStatistics) -> dict[str, float]:
    """The scalars of one MoE layer, by the end of their tag."""
    return {
        "max over mean load": layer.max_over_mean_load,
        "drop rate": layer.drop_rate,
        "router entropy": layer.router_entropy,
        "load balancing loss": layer.aux_loss,
        "router z loss": layer.z_loss,
    }


def _add_bars(board: SummaryWriter, tag: str, values: Sequence[float], iteration: int) -> None:
    """Add a histogram whose bar at position e is the value of expert e.

    `add_histogram` would bin the loads and lose which expert has which. With raw buckets, loads
    [3, 1] become 3 observations in the bucket that ends at 0.5 and 1 in the one that ends at 1.5.
    """
    positions = range(len(values))
    board.add_histogram_raw(
        tag,
        min=-0.5,
        max=len(values) - 0.5,
        num=int(sum(values)),
        sum=sum(e * value for e, value in zip(positions, values, strict=True)),
        sum_squares=sum(e * e * value for e, value in zip(positions, values, strict=True)),
        bucket_limits=[e + 0.5 for e in positions],
        bucket_counts=list(values),
        global_step=iteration,
    )
