"""What a run tells: progress lines, TensorBoard, the metrics file. Rank 0 writes, others do not.

The tags of TensorBoard are listed in docs/training.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import LoggingConfig
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.training.lines import (
    evaluation_line,
    final_lines,
    progress_line,
    starting_lines,
    switch_lines,
)
from megatron_moe.training.metrics import Evaluation, StepRecord, Summary, Throughput
from megatron_moe.training.outputs import drop_later_steps
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.run import TrainingRun

Layers = Mapping[int, LayerStatistics]
"""Routing since the last log interval, by 0-based layer number."""


class Reporter:
    """Writes to standard output, TensorBoard and the metrics file.

    Args:
        logging: where to write.
        iterations: steps of the whole run, for `12/100`.
        writes: whether this rank writes.
        start: step that the run goes on from. What an earlier start wrote of later steps, which
            will be run again, is dropped.
    """

    def __init__(
        self, logging: LoggingConfig, iterations: int, writes: bool, start: int = 0
    ) -> None:
        self._logging, self._iterations, self._writes = logging, iterations, writes
        self._board: SummaryWriter | None = None
        self._file: Path | None = None
        self._stage: Phase | None = None
        if writes and logging.tensorboard_dir is not None:
            self._board = SummaryWriter(logging.tensorboard_dir, purge_step=start + 1)
        if writes and logging.metrics_file is not None:
            self._file = Path(logging.metrics_file)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            drop_later_steps(self._file, start)

    def say(self, line: str) -> None:
        """One line on standard output, at once."""
        if self._writes:
            print(line, flush=True)

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """What is about to run, where, and on what."""
        if self._writes:
            for line in starting_lines(run, schedule, data, state):
                self.say(line)
        if schedule.has_phases:
            self._stage = schedule.at(state.iteration)

    def stage(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """Another stage begins: what it has differently and what its data is made of, in the log
        and in TensorBoard's texts.
        """
        self._stage = after
        lines = switch_lines(before, after, data, state)
        for line in lines:
            self.say(line)
        if self._board is not None:
            text = "\n".join(f"- {line.strip()}" for line in lines)
            self._board.add_text("stage", text, state.iteration + 1)
            self._board.add_scalar("train/stage", after.number, state.iteration + 1)

    def end(self, summary: Summary) -> None:
        """How it went, in the last lines."""
        if self._writes:
            for line in final_lines(summary, self._logging):
                self.say(line)
        if self._board is not None:
            self._board.close()

    def interval(
        self,
        records: Sequence[StepRecord],
        speed: Throughput,
        layers: Layers,
    ) -> None:
        """Everything about the steps since the last log interval.

        Args:
            records: the steps, oldest first.
            speed: their throughput.
            layers: their routing.
        """
        if not self._writes:
            return
        name = self._stage.name if self._stage is not None else ""
        self.say(progress_line(records, speed, layers, self._iterations, name))
        if self._file is not None:
            with self._file.open("a") as file:
                file.writelines(json.dumps(record.to_json()) + "\n" for record in records)
        if self._board is not None:
            self._training_scalars(records, speed)
            for number, layer in layers.items():
                self._layer_scalars(number, layer, records[-1].iteration)

    def evaluation(self, name: str, iteration: int, found: Evaluation) -> None:
        """A held-out loss and those of its domains: in the log, the metrics file and TensorBoard.

        TensorBoard has them under `{name}/lm loss` and `{name}/lm loss of {domain}`. The metrics
        file, which else has nothing but steps, gets a line if there are several domains.
        """
        if self._writes:
            self.say(evaluation_line(name, iteration, found))
        if self._file is not None and found.domains:
            line = {"iteration": iteration, "evaluation": name, **found.to_json()}
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self._board is not None:
            self._board.add_scalar(f"{name}/lm loss", found.lm_loss, iteration)
            self._board.add_scalar(f"{name}/perplexity", found.perplexity, iteration)
            for domain, part in found.domains.items():
                self._board.add_scalar(f"{name}/lm loss of {domain}", part.lm_loss, iteration)

    def _training_scalars(self, records: Sequence[StepRecord], speed: Throughput) -> None:
        last, board = records[-1], self._board
        assert board is not None
        for record in records:
            board.add_scalar("train/lm loss", record.lm_loss, record.iteration)
            board.add_scalar("train/grad norm", record.grad_norm, record.iteration)
            board.add_scalar("train/learning rate", record.learning_rate, record.iteration)
            board.add_scalar("train/logit z", record.logit_z, record.iteration)
        values = {
            "train/consumed samples": float(last.consumed_samples),
            "train/batch size": float(last.batch_size),
            "speed/tokens per second": speed.tokens_per_second,
            "speed/model TFLOPs per device": speed.tflops_per_device,
            "speed/seconds per step": speed.seconds_per_step,
            "memory/max allocated MiB": speed.memory_bytes / 2**20,
        }
        if self._stage is not None:
            values["train/stage"] = float(self._stage.number)
        if speed.mfu is not None:
            values["speed/MFU"] = speed.mfu
        for tag, value in values.items():
            board.add_scalar(tag, value, last.iteration)

    def _layer_scalars(self, number: int, layer: LayerStatistics, iteration: int) -> None:
        assert self._board is not None
        prefix = f"moe/layer {number:02d}"
        for tag, value in layer_values(layer).items():
            self._board.add_scalar(f"{prefix}/{tag}", value, iteration)
        _bars(self._board, f"{prefix}/load per expert", layer.load, iteration)


def layer_values(layer: LayerStatistics) -> dict[str, float]:
    """The scalars of one MoE layer, by the end of their tag."""
    return {
        "max over mean load": layer.max_over_mean_load,
        "drop rate": layer.drop_rate,
        "router entropy": layer.router_entropy,
        "load balancing loss": layer.aux_loss,
        "router z loss": layer.z_loss,
    }


def _bars(board: SummaryWriter, tag: str, values: Sequence[float], iteration: int) -> None:
    """A histogram whose bar at position e is the value of expert e."""
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
