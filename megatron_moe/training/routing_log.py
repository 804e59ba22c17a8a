"""`--routing-log-file`: statistics of routing as JSON Lines, for programs.

A line at every `--log-interval`, with all MoE layers by their 0-based number:

    {"iteration": 100, "arithmetic": {"tokens": 819200, "asked": 1.8e15, "done": 1.6e15},
     "layers": {"3": {"load": [...], "drop_rate": 0.41, ...}, ...}}

and one for each probe:

    {"iteration": 100, "probe": {"tokens": 2048, "chance": 0.25, "layers": {"3": {...}}}}

`arithmetic` has the training FLOPs of the interval over all ranks, for tokens that are not padding:
those that the model asks for, with all K choices, and those that were done, without dropped ones.
They are counts, the same in every run of the same steps; for speeds see the log.

The keys of a layer are those of `LayerStatistics.to_json` and of `LayerProbe`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint import TrainState
from megatron_moe.data.pipeline import Data
from megatron_moe.training.metrics import Evaluation, Interval, Summary
from megatron_moe.training.outputs import drop_later_steps
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.probe_statistics import ProbeResult
from megatron_moe.training.run import TrainingRun


class RoutingLogSink:
    """Appends a line for each report; the file of a model without MoE layers stays empty.

    Args:
        path: of the file; its directory is created.
        first_iteration: later steps are removed from an existing file.
    """

    def __init__(self, path: Path, first_iteration: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_later_steps(path, first_iteration)

    def interval(self, interval: Interval) -> None:
        """A line with the layers."""
        if interval.layers:
            layers = {str(n): layer.to_json() for n, layer in interval.layers.items()}
            line: dict[str, Any] = {"iteration": interval.records[-1].iteration}
            if interval.speed.arithmetic is not None:
                line["arithmetic"] = dataclasses.asdict(interval.speed.arithmetic)
            self._append({**line, "layers": layers})

    def probe(self, result: ProbeResult) -> None:
        """A line with the layers."""
        self._append({"iteration": result.iteration, "probe": result.to_json()})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """Nothing: lines are of steps."""

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """Nothing, as for `start`."""

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """Nothing: routing is not reported for evaluations."""

    def end(self, summary: Summary) -> None:
        """Nothing: every line was written and closed."""


def _finite(value: Any) -> Any:
    """The same with `None` for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
