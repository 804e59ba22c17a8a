"""Values that are logged on request, read back from TensorBoard, W&B, the metrics file and the log.

What they are is held against the reference model in `test_step.py`; here, that every destination
has them, under the documented tags, for the right steps.
"""

from __future__ import annotations

import glob
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.outputs import check_outputs
from tests.training.tiny import MODEL, pretrain_rank

ON = (
    "--log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --log-timers-to-tensorboard "
    "--log-memory-to-tensorboard --tensorboard-log-interval 3 --tensorboard-queue-size 1 "
    "--wandb-project moe --wandb-exp-name first --train-iters 8 --eval-iters 1 --eval-interval 7 "
    "--split 80,20,0"
)
STEP_TIMERS = {
    "batch-generator",
    "forward-backward",
    "forward-compute",
    "backward-compute",
    "all-to-all",
    "all-grads-sync",
    "optimizer-copy-to-main-grad",
    "optimizer-clip-main-grad",
    "optimizer-inner-step",
    "optimizer",
}
"""Timers of a run without pipeline stages, in Megatron-LM's names."""


def offline_run(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, str, str]:
    """`pretrain_rank` without a network for W&B."""
    import os

    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        del os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"]


class Logged:
    """A run of two ranks, and what it left."""

    def __init__(self, pool: Any, corpus: str, folder: Path) -> None:
        argv = [*MODEL, *ON.split(), "--data-path", corpus, "--expert-model-parallel-size", "2"]
        argv += ["--tensorboard-dir", str(folder / "board")]
        argv += ["--metrics-file", str(folder / "metrics.jsonl")]
        argv += ["--wandb-save-dir", str(folder / "wb")]
        argv += ["--save", str(folder / "checkpoints"), "--save-interval", "4"]
        self.results = pool.run(offline_run, 2, argv=argv)
        self.log = self.results[0][1]
        self.folder, self.config = folder, parse_args(argv).config
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.steps = [json.loads(line) for line in lines]
        self.board = EventAccumulator(str(folder / "board"), {"scalars": 0})
        self.board.Reload()

    def scalars(self, tag: str) -> dict[int, float]:
        return {event.step: event.value for event in self.board.Scalars(tag)}


@pytest.fixture(scope="module")
def logged(pool, corpus, tmp_path_factory) -> Logged:
    return Logged(pool, corpus, tmp_path_factory.mktemp("logged"))


def test_the_run_ends_well_and_the_metrics_file_has_every_step(logged: Logged) -> None:
    assert [result[0] for result in logged.results] == [0, 0], logged.results
    assert len(logged.steps) == 8
    norms = [step["params_norm"] for step in logged.steps]
    assert len(set(norms)) == 8
    assert all(step["num_zeros"] > 0 for step in logged.steps)


def test_points_of_every_step_follow_tensorboard_log_interval(logged: Logged) -> None:
    for tag, key in (("num zeros", "num_zeros"), ("params norm", "params_norm")):
        expected = {n: logged.steps[n - 1][key] for n in (3, 6)}
        assert logged.scalars(f"train/{tag}") == pytest.approx(expected, rel=1e-6)
    assert list(logged.scalars("train/lm loss")) == [3, 6]
    assert list(logged.scalars("speed/tokens per second")) == [4, 8]


def test_memory_and_times_are_in_tensorboard_and_documented(logged: Logged) -> None:
    tags = set(logged.board.Tags()["scalars"])
    assert {tag[7:] for tag in tags if tag.startswith("timers/")} >= STEP_TIMERS
    assert {tag for tag in tags if tag.startswith("memory/")} == {
        f"memory/{name} MiB" for name in ("max allocated", "allocated", "reserved")
    }
    assert all(value > 1 for value in logged.scalars("memory/allocated MiB").values())
    manual = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for tag in ("train/num zeros", "train/params norm", "memory/reserved MiB", "timers/NAME"):
        assert tag in manual, tag


def test_a_part_of_a_step_takes_less_than_the_step(logged: Logged) -> None:
    whole = logged.scalars("speed/seconds per step")
    times = {name: logged.scalars(f"timers/{name}") for name in STEP_TIMERS}
    least = {name: logged.scalars(f"timers/{name} least") for name in STEP_TIMERS}
    for step, seconds in whole.items():
        assert 0 < times["forward-backward"][step] < seconds
        assert times["optimizer-inner-step"][step] < times["optimizer"][step] < seconds
        assert times["all-to-all"][step] < times["forward-backward"][step]
        # The most of each may be of different ranks, whose sum is longer than either.
        inner = least["forward-compute"][step] + least["backward-compute"][step]
        assert inner < times["forward-backward"][step]


def test_the_log_has_norm_zeros_and_the_least_and_most_time_of_each_timer(logged: Logged) -> None:
    line = next(line for line in logged.log.splitlines() if line.startswith(" iteration 8/8"))
    assert f"num zeros {logged.steps[-1]['num_zeros']} " in line
    assert f"params norm {logged.steps[-1]['params_norm']:.4f} " in line
    times = [line for line in logged.log.splitlines() if line.startswith(" (min, max) ms/iter")]
    assert len(times) == 3
    for part in times[1].split(" | ")[1:]:
        name, low, high = part.rsplit(" ", 2)
        assert re.fullmatch(r"[a-z-]+", name)
        assert float(low) <= float(high)


def test_saves_are_timed_the_last_one_in_the_log_alone(logged: Logged) -> None:
    assert list(logged.scalars("timers/save-checkpoint")) == [8]  # of the save after step 4
    times = [line for line in logged.log.splitlines() if line.startswith(" (min, max) ms/iter")]
    assert ["save-checkpoint" in line for line in times] == [False, True, True]
    assert len(times[-1].split(" | ")) == 2


def wandb_records(path: str) -> Iterator[bytes]:
    """Records of a run's file: LevelDB's log format after a header of 7 bytes.

    Blocks of 32 KiB hold chunks of: checksum (4), length (2), kind (1), data. Kind 1 is a whole
    record; 2, 3 and 4 are its first, middle and last part.
    """
    content, at, parts = Path(path).read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # too short for a chunk: zeros
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        part = content[at + 7 : at + 7 + length]
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            yield parts
        at += 7 + length


def wandb_history(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """Points by iteration, and the configuration, from the file of an offline run.

    W&B drops a value whose step is below that of the value before it, as the points of steps are
    after an evaluation between them. Its axis is therefore the metric `iteration`.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = glob.glob(str(folder / "wb" / "wandb" / "offline-run-*" / "run-*.wandb"))
    points: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    axes: dict[str, str] = {}
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            values: dict[str, Any] = {}
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = values
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            points.setdefault(values["iteration"], {}).update(values)
        if record.HasField("metric") and record.metric.HasField("options"):
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        if record.HasField("run"):
            config |= {"project": record.run.project, "name": record.run.display_name}
            for item in record.run.config.update:
                config[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert axes["*"] == "iteration", axes
    return points, config


def test_weights_and_biases_has_the_same_points_and_the_configuration(logged: Logged) -> None:
    points, config = wandb_history(logged.folder)
    assert (config["project"], config["name"]) == ("moe", "first")
    assert config["model"]["hidden_size"] == 32
    assert config["logging"]["wandb_project"] == "moe"
    for tag in logged.board.Tags()["scalars"]:
        mine = {step: values[tag] for step, values in points.items() if tag in values}
        assert mine == pytest.approx(logged.scalars(tag), rel=1e-6), tag
    loads = points[8]["moe/layer 01/load per expert"]
    assert sum(loads["values"]) == 4 * 8 * 32 * 2  # steps, sequences, positions, choices
    assert loads["bins"] == [-0.5, 0.5, 1.5, 2.5, 3.5]


WRONG = {
    "--wandb-project p": "--wandb-exp-name must be a name with --wandb-project",
    "--wandb-exp-name e": "--wandb-exp-name must be used with --wandb-project (got 'e')",
    "--wandb-entity e": "--wandb-entity must be used with --wandb-project (got 'e')",
    "--tensorboard-log-interval 0": "--tensorboard-log-interval must be >= 1 (got 0)",
    "--timing-log-level 3": "--timing-log-level must be one of 0, 1, 2 (got '3')",
}


@pytest.mark.parametrize("line", list(WRONG))
def test_wrong_values_are_errors(line: str) -> None:
    with pytest.raises(UsageError) as error:
        validate(parse_args(["--train-iters", "1", *line.split()]).config)
    assert WRONG[line] in str(error.value)


def test_without_the_package_wandb_is_one_line(tmp_path: Path, monkeypatch) -> None:
    """Before the run starts, on every rank. Python takes `None` for a package that is missing."""
    config = parse_args(["--wandb-project", "p", "--wandb-exp-name", "e"]).config
    check_outputs(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError) as error:
        check_outputs(config)
    assert "--wandb-project must be used with wandb installed" in str(error.value)
    assert "pip install 'megatron-moe[wandb]'" in str(error.value)


def test_wandb_is_imported_only_by_runs_that_use_it() -> None:
    """Megatron-Core would: it takes seconds, in every process."""
    code = (
        "import sys; from megatron_moe.platform import activate; activate();"
        "import megatron_moe.training.trainer; sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
