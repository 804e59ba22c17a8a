"""Where a run reports to: log, files, TensorBoard, Weights & Biases, boards. Only rank 0 writes.

Each destination is a `Sink`, one class with a method for each event. A board that plots numbers
against steps is a file of `training/boards/`; for any other sink, write the class in a file of its
own and add it to `build_reporter`. The `Trainer` needs no change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import RunConfig
from megatron_moe.config.boards import boards_of
from megatron_moe.data.pipeline import Data
from megatron_moe.errors import UsageError
from megatron_moe.training.board_registry import BOARDS, FLAG
from megatron_moe.training.log import LogSink, print_line
from megatron_moe.training.metrics import Evaluation, Interval, Summary
from megatron_moe.training.outputs import drop_later_steps
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.probe_statistics import ProbeResult
from megatron_moe.training.routing_log import RoutingLogSink
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.sinks import Sink
from megatron_moe.training.tensorboard import TensorBoardSink
from megatron_moe.training.wandb_run import WandbSink


class Reporter:
    """Passes each event to all sinks; one that fails is left out from then on, with a warning.

    A full disk or a lost file system is no reason to lose steps. What a sink raises for it is an
    `OSError`; anything else is a defect, and ends the run.

    Args:
        sinks: by the flag and value that a warning names, in the order in which they are called;
            none on ranks that do not write.
        writes: whether this rank prints `log` lines.
    """

    def __init__(self, sinks: Mapping[str, Sink], writes: bool) -> None:
        self._sinks, self._writes = dict(sinks), writes
        self._failed = False

    def log(self, line: str) -> None:
        """Print one line to standard output."""
        if self._writes:
            print_line(line)

    def failed(self) -> bool:
        """Whether a sink was left out, on this rank."""
        return self._failed

    def add(self, name: str, open_sink: Callable[[], Sink]) -> None:
        """Open one more sink; without it, if it cannot be opened."""
        try:
            self._sinks[name] = open_sink()
        except OSError as error:
            self.leave_out(name, error)

    def leave_out(self, name: str, error: OSError) -> None:
        """Warn that a destination cannot be written, and go on without it."""
        self._sinks.pop(name, None)
        self._failed = True
        print_line(f" WARNING: {name} cannot be written any more, and is left out: {error}")

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """See `Sink.start`."""
        self._each(lambda sink: sink.start(run, schedule, data, state))

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """See `Sink.phase`."""
        self._each(lambda sink: sink.phase(before, after, data, state))

    def interval(self, interval: Interval) -> None:
        """See `Sink.interval`."""
        self._each(lambda sink: sink.interval(interval))

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """See `Sink.evaluation`."""
        self._each(lambda sink: sink.evaluation(name, iteration, result))

    def probe(self, result: ProbeResult) -> None:
        """See `Sink.probe`."""
        self._each(lambda sink: sink.probe(result))

    def end(self, summary: Summary) -> None:
        """See `Sink.end`."""
        self._each(lambda sink: sink.end(summary))

    def _each(self, event: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                event(sink)
            except OSError as error:
                self.leave_out(name, error)


def build_reporter(config: RunConfig, iterations: int, rank: int, first_iteration: int) -> Reporter:
    """The sinks that the flags name, on rank 0; none on other ranks.

    Args:
        config: of the run, which names the destinations.
        iterations: steps of the whole run.
        rank: this rank.
        first_iteration: step that the run resumes from. Records of later steps, which an earlier
            start wrote and which are taken again, are removed.

    Raises:
        UsageError: W&B cannot start the run; or a destination cannot be written, and
            `--log-failure-policy` is `stop`.
    """
    if rank != 0:
        return Reporter({}, writes=False)
    logging = config.logging
    reporter = Reporter({"the log": LogSink(logging, iterations)}, writes=True)
    if (file := logging.metrics_file) is not None:
        reporter.add(f"--metrics-file {file}", lambda: MetricsFileSink(Path(file), first_iteration))
    if (routing := logging.routing_log_file) is not None:
        name = f"--routing-log-file {routing}"
        reporter.add(name, lambda: RoutingLogSink(Path(routing), first_iteration))
    if (board := logging.tensorboard_dir) is not None:
        reporter.add(
            f"--tensorboard-dir {board}", lambda: TensorBoardSink(board, first_iteration, logging)
        )
    if logging.wandb_project:
        reporter.add(f"--wandb-project {logging.wandb_project}", lambda: WandbSink(config))
    for name, project in boards_of(logging.log_boards).items():
        opens = partial(BOARDS[name].open_sink, config, project)
        reporter.add(f"{FLAG} {name}={project}", opens)
    if reporter.failed() and logging.log_failure_policy == "stop":
        expected = "continue while a destination of the log cannot be written"
        raise UsageError("--log-failure-policy", "stop", expected)
    return reporter


class MetricsFileSink:
    """`--metrics-file`: one JSON object per step, with exact floats.

    Args:
        path: of the file; its directory is created.
        first_iteration: later steps are removed from an existing file.
    """

    def __init__(self, path: Path, first_iteration: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_later_steps(path, first_iteration)

    def interval(self, interval: Interval) -> None:
        """A line for each step of the interval."""
        with self._path.open("a") as file:
            file.writelines(json.dumps(record.to_json()) + "\n" for record in interval.records)

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """A line if there are several domains; otherwise the file holds nothing but steps."""
        if result.domains:
            line = {"iteration": iteration, "evaluation": name, **result.to_json()}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def probe(self, result: ProbeResult) -> None:
        """Nothing: the file is for programs that compare steps."""

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """Nothing: the file is for programs that compare steps."""

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """Nothing, as for `start`."""

    def end(self, summary: Summary) -> None:
        """Nothing: every line was written and closed."""
