"""`--log-boards`: MLflow and trackio get what TensorBoard gets; a new board is one file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config import boards as config_boards
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training import boards
from megatron_moe.training.board_registry import BOARDS, check_boards
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

RUN = (
    "--train-iters 4 --log-interval 2 --eval-iters 1 --eval-interval 2 --split 80,20,0 "
    "--routing-log-interval 2 --log-run-name first --log-boards mlflow=moe trackio=moe"
)


def run_offline(
    rank: int, world_size: int, *, argv: list[str], folder: str
) -> tuple[tuple[int, str, str], Any]:
    """A run whose boards are local folders, and what trackio has afterwards."""
    local = {
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": f"{folder}/trackio",
    }
    os.environ.update(local)
    try:
        outcome = pretrain_rank(rank, world_size, argv=argv)
        if rank != 0:
            return outcome, None
        from trackio import Api
        from trackio.sqlite_storage import SQLiteStorage

        config = Api().runs("moe")[0].config
        return outcome, (SQLiteStorage.get_logs("moe", "first"), config)
    finally:
        for name in local:
            del os.environ[name]


class Logged:
    """One run, and all boards."""

    def __init__(self, pool: Pool, corpus: str, folder: Path) -> None:
        self.folder = folder
        argv = [*MODEL, *RUN.split(), "--data-path", corpus, "--tensorboard-dir", str(folder / "b")]
        argv += ["--expert-model-parallel-size", "2"]
        results = pool.run(run_offline, 2, argv=argv, folder=str(folder))
        assert [(code, error) for (code, _, error), _ in results] == [(0, "")] * 2
        self.log = results[0][0][1]
        self.trackio, self.trackio_config = results[0][1]
        self.board = EventAccumulator(str(folder / "b"), {"scalars": 0, "histograms": 0})
        self.board.Reload()


@pytest.fixture(scope="module")
def logged(pool: Pool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    return Logged(pool, corpus, tmp_path_factory.mktemp("boards"))


def near(points: dict[int, float]) -> Any:
    return pytest.approx(points, rel=1e-5, abs=1e-6)


def test_mlflow_has_what_tensorboard_has(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"file://{logged.folder}/mlflow")
    experiment = client.get_experiment_by_name("moe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    tags = logged.board.Tags()["scalars"]
    assert len(tags) > 40
    for tag in tags:
        found = client.get_metric_history(run.info.run_id, tag)
        points = {event.step: event.value for event in logged.board.Scalars(tag)}
        assert {metric.step: metric.value for metric in found} == near(points), tag
    path = client.download_artifacts(
        run.info.run_id, "moe/layer 01/load per expert/00000002.json", str(logged.folder)
    )
    events = logged.board.Histograms("moe/layer 01/load per expert")
    assert json.loads(Path(path).read_text()) == list(events[0].histogram_value.bucket)
    path = client.download_artifacts(run.info.run_id, "config.json", str(logged.folder))
    assert json.loads(Path(path).read_text())["logging"]["log_run_name"] == "first"


def test_trackio_has_what_tensorboard_has(logged: Logged) -> None:
    for tag in logged.board.Tags()["scalars"]:
        points = {event.step: event.value for event in logged.board.Scalars(tag)}
        found = {record["step"]: record[tag] for record in logged.trackio if tag in record}
        assert found == near(points), tag
    tag = "moe/layer 01/load per expert"
    events = logged.board.Histograms(tag)
    bars = [record[tag] for record in logged.trackio if tag in record]
    assert [bar["values"] for bar in bars] == [list(e.histogram_value.bucket) for e in events]
    assert logged.trackio_config["logging"]["log_run_name"] == "first"
    assert "rackio" not in logged.log, "its messages are not part of the log"


NEW = '''
"""A toy board."""

from megatron_moe.training.board_registry import BOARDS
from megatron_moe.training.sinks import BoardSink


@BOARDS.register("toy", package="json", extra="toy")
class Toy(BoardSink):
    def __init__(self, config, project):
        super().__init__(config.logging)
        self.project, self.points = project, []

    def add(self, values, iteration):
        self.points += [(iteration, tag, value) for tag, value in values.items()]

    def add_bars(self, tag, values, iteration): ...

    def add_text(self, tag, text, iteration): ...

    def close(self): ...
'''


def test_a_new_board_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_moe.training.reporting import build_reporter

    (tmp_path / "toy.py").write_text(NEW)
    monkeypatch.setattr(config_boards, "FOLDER", tmp_path)
    monkeypatch.setattr(boards, "__path__", [*boards.__path__, str(tmp_path)])
    config = parse_args(["--log-boards", "toy=mine", "--data-path", "x"]).config
    try:
        validate(config)
        check_boards(config)
        reporter = build_reporter(config, 1, rank=0, first_iteration=0)
        toy: Any = reporter._sinks["--log-boards toy=mine"]
        toy.add({"a": 1.0}, 3)
        assert (toy.project, toy.points) == ("mine", [(3, "a", 1.0)])
    finally:
        sys.modules.pop("megatron_moe.training.boards.toy", None)
        BOARDS._boards.pop("toy", None)


@pytest.mark.parametrize(
    "word", ["mlflow", "mlflow=", "=x", "other=x", "trackio=a mlflow=b mlflow=c"]
)
def test_other_words_are_refused(word: str) -> None:
    config = parse_args(["--log-boards", *word.split(), "--data-path", "x"]).config
    with pytest.raises(UsageError, match="each NAME once and one of mlflow, trackio"):
        validate(config)


def test_a_name_without_a_board_is_refused() -> None:
    with pytest.raises(UsageError, match="--log-run-name must be used with --log-boards"):
        validate(parse_args(["--log-run-name", "x", "--data-path", "x"]).config)


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_without_its_package_a_board_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = parse_args(["--log-boards", f"{name}=p"]).config
    with pytest.raises(UsageError) as error:
        check_boards(config)
    assert f"pip install 'megatron-moe[{name}]'" in str(error.value)


def test_mlflow_without_a_store_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/x")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    config = parse_args(["--log-boards", "mlflow=p"]).config
    with pytest.raises(UsageError, match="set MLFLOW_TRACKING_URI"):
        BOARDS["mlflow"].open_sink(config, "p")


def test_what_mlflow_raises_later_leaves_the_board_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/x")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    sink = BOARDS["mlflow"].open_sink(parse_args([]).config, "p")
    sink._id = "gone"  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="gone"):
        sink.add({"a": 1.0}, 1)
