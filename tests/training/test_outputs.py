"""Outputs that cannot be written end a run before it starts; a resumed run stays consistent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config import CheckpointConfig, LoggingConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.outputs import check_outputs, drop_later_steps
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

FLAGS = ["--save", "--tensorboard-dir", "--metrics-file", "--routing-log-file"]


def _run(flag: str, path: str) -> RunConfig:
    name = flag.removeprefix("--").replace("-", "_")
    if name == "save":
        return RunConfig(checkpoint=CheckpointConfig(save=path))
    return RunConfig(logging=replace(LoggingConfig(), **{name: path}))


@pytest.mark.parametrize(
    "flag", ["--save", "--tensorboard-dir", "--metrics-file", "--routing-log-file"]
)
def test_a_path_through_a_file_is_rejected(flag: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as error:
        check_outputs(_run(flag, str(tmp_path / "file" / "new" / "x")))
    assert error.value.what == flag


@pytest.mark.parametrize(
    "flag", ["--save", "--tensorboard-dir", "--metrics-file", "--routing-log-file"]
)
def test_a_directory_without_write_access_is_rejected(flag: str) -> None:
    with pytest.raises(UsageError) as error:
        check_outputs(_run(flag, "/proc/none/x"))
    assert error.value.what == flag


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
def test_a_directory_whose_files_no_library_opens_is_rejected(flag: str, tmp_path: Path) -> None:
    """A name in Latin-1: checkpoints would be written, and could not be loaded."""
    with pytest.raises(UsageError, match=r"must be a path in UTF-8 .*caf\\udce9") as error:
        check_outputs(_run(flag, f"{tmp_path}/caf\udce9"))
    assert error.value.what == flag
    check_outputs(_run("--metrics-file", f"{tmp_path}/caf\udce9"))


def test_a_directory_is_not_a_metrics_file(tmp_path: Path) -> None:
    for flag in ("--metrics-file", "--routing-log-file"):
        with pytest.raises(UsageError, match=f"{flag} must be a file, not a directory"):
            check_outputs(_run(flag, str(tmp_path)))


@pytest.mark.parametrize(
    "flag", ["--save", "--tensorboard-dir", "--metrics-file", "--routing-log-file"]
)
def test_checking_creates_nothing(flag: str, tmp_path: Path) -> None:
    check_outputs(_run(flag, str(tmp_path / "a" / "b")))
    assert not list(tmp_path.iterdir())


def test_records_of_later_steps_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i}) for i in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"iterat')
    drop_later_steps(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    drop_later_steps(tmp_path / "none", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_going_back_leaves_each_step_once(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """Six steps, then again from step 4 with another rate: steps 5 and 6 are the new ones."""
    argv = [*MODEL, "--data-path", corpus, "--split", "80,20,0", "--train-iters", "6"]
    argv += ["--save", str(tmp_path / "save"), "--save-interval", "2", "--lr-decay-style"]
    argv += ["constant", "--metrics-file", str(tmp_path / "m.jsonl"), "--log-interval", "2"]
    argv += ["--tensorboard-dir", str(tmp_path / "board")]
    again = ["--load", str(tmp_path / "save"), "--ckpt-step", "4", "--lr", "1e-4"]
    ((code, _, error),) = pool.run(pretrain_rank, 1, argv=argv)
    assert code == 0, error
    ((code, log, error),) = pool.run(pretrain_rank, 1, argv=[*argv, *again])
    assert code == 0, error
    assert "since the checkpoint: --lr was 0.003, is 0.0001" in log
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(tmp_path / "board"), {"scalars": 0})
    board.Reload()
    rates = {event.step: event.value for event in board.Scalars("train/learning rate")}
    assert len(board.Scalars("train/learning rate")) == 6
    assert rates[6] == pytest.approx(1e-4)
    assert rates[4] == pytest.approx(3e-3)
