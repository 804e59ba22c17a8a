"""A metrics file, TensorBoard or log that cannot be written any more never costs a step.

`/dev/full` and a directory that is gone give the kernel's own errors at the next write.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import LoggingConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.log import LogSink, print_line
from megatron_moe.training.metrics import Summary
from megatron_moe.training.reporting import build_reporter
from megatron_moe.training.tensorboard import TensorBoardSink
from tests.faults.killing import fork
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

STEPS = 6
BROKEN = 3
"""The step after which nothing can be written."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "counting")


def break_destinations(directory: Path, how: str) -> None:
    """From now on no write to the metrics file and TensorBoard of a run succeeds."""
    logs = directory / "logs"
    if how == "gone":
        logs.rename(directory / "elsewhere")
        return
    for path in (logs / "metrics.jsonl", *logs.glob("board/events*")):
        path.rename(path.with_name(f"before-{path.name}"))
        path.symlink_to("/dev/full")


def _broken_run(
    rank: int, world_size: int, *, argv: list[str], directory: Path, how: str
) -> tuple[int, str, str, str]:
    """A run whose destinations break after a step; also what it wrote to standard error."""
    from megatron_moe.training.trainer import Trainer

    report, errors, before = Trainer.report, io.StringIO(), sys.stderr

    def broken(trainer: Trainer) -> None:
        report(trainer)
        if rank == 0 and trainer.state.iteration == BROKEN:
            break_destinations(directory, how)

    Trainer.report, sys.stderr = broken, errors  # type: ignore[method-assign]
    try:
        return (*pretrain_rank(rank, world_size, argv=argv), errors.getvalue())
    finally:
        Trainer.report, sys.stderr = report, before  # type: ignore[method-assign]


def _argv(corpus: str, directory: Path, *flags: str) -> list[str]:
    argv = [*MODEL, "--data-path", corpus, "--train-iters", str(STEPS), "--log-interval", "1"]
    argv += ["--metrics-file", f"{directory}/logs/metrics.jsonl", "--save", f"{directory}/save"]
    argv += ["--tensorboard-dir", f"{directory}/logs/board", "--tensorboard-queue-size", "1"]
    return [*argv, "--save-interval", "2", *flags]


@pytest.mark.parametrize("how", ["full", "gone"])
def test_the_run_goes_on_without_them_and_says_so_once(pool, corpus, tmp_path, how):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ((code, _, error),) = pool.run(pretrain_rank, 1, argv=_argv(corpus, whole))
    assert code == 0, error
    argv = _argv(corpus, broken)
    ((code, out, error, stderr),) = pool.run(_broken_run, 1, argv=argv, directory=broken, how=how)
    assert code == 0, error
    assert "Traceback" not in stderr
    reason = "No space left on device" if how == "full" else "No such file or directory"
    warnings = [line for line in out.splitlines() if "WARNING" in line]
    for line, flag in zip(
        sorted(warnings),
        (f"--metrics-file {broken}/logs/metrics.jsonl", f"--tensorboard-dir {broken}/logs/board"),
        strict=True,
    ):
        assert line.startswith(f" WARNING: {flag} cannot be written any more, and is left out: ")
        assert reason in line
    assert f" iteration {STEPS}/{STEPS} " in out
    name = f"iter_{STEPS:07d}/rank-00000.safetensors"
    assert (broken / "save" / name).read_bytes() == (whole / "save" / name).read_bytes()
    if how == "full":
        lines = (broken / "logs" / "before-metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]


def test_or_it_saves_and_stops_on_every_rank(pool, corpus, tmp_path):
    argv = _argv(corpus, tmp_path, "--log-failure-policy", "stop", "--train-iters", "40")
    argv += ["--expert-model-parallel-size", "2"]
    results = pool.run(_broken_run, 2, argv=argv, directory=tmp_path, how="full")
    assert [code for code, *_ in results] == [1, 1]
    out = results[0][1]
    saved = int((tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text())
    assert BROKEN < saved < 40
    said = "--log-failure-policy stop: a destination of the log cannot be written"
    assert f" exiting at iteration {saved}: {said}" in out.splitlines()
    assert out.splitlines()[-1] == f" error: {said}"


def _logging(directory: Path, **settings: Any) -> RunConfig:
    logging = LoggingConfig(
        metrics_file=str(directory / "metrics.jsonl"),
        tensorboard_dir=str(directory / "board"),
        **settings,
    )
    return RunConfig(logging=logging)


def test_a_restart_on_a_full_disk_keeps_the_file_of_the_steps_before(scarce, capsys):
    directory, room = scarce
    directory.mkdir()
    lines = "".join(json.dumps({"iteration": n, "x": "y" * 900}) + "\n" for n in range(1, 9))
    (directory / "metrics.jsonl").write_text(lines)
    with room(0):
        reporter = build_reporter(_logging(directory), 20, rank=0, first_iteration=6)
        assert reporter.failed()
        with pytest.raises(UsageError, match="--log-failure-policy must be continue while a"):
            build_reporter(
                _logging(directory, log_failure_policy="stop"), 20, rank=0, first_iteration=6
            )
    warned = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in warned] == ["--metrics-file", "--tensorboard-dir"] * 2
    assert (directory / "metrics.jsonl").read_text() == lines
    assert not list(directory.glob("*.tmp"))


def test_tensorboards_thread_prints_no_traceback(tmp_path, capfd, monkeypatch):
    hook = threading.__excepthook__  # Python's own, which prints; pytest has one that does not
    monkeypatch.setattr(threading, "excepthook", hook)
    sink = TensorBoardSink(str(tmp_path), 0, LoggingConfig(tensorboard_queue_size=1))
    sink.add({"a": 1.0}, 1)
    (events,) = tmp_path.glob("events*")
    events.unlink()
    events.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        sink.add({f"tag {number}": 1.0 for number in range(500_000)}, 2)
    with pytest.raises(OSError, match="No space left"):
        sink.close()
    assert capfd.readouterr().err == ""
    assert threading.excepthook is hook, "as before"


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    """Not even with exit code 120, which Python gives if its last flush fails."""
    said = tmp_path / "said"

    def body() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = os.fdopen(1, "w")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for number in range(3):
                print_line(f" line {number}")
            summary = Summary(
                state=TrainState(), first=None, last=None, valid=None, tokens_per_second=0.0
            )
            LogSink(LoggingConfig(), 20).end(summary)
        sys.stdout.flush()
        said.write_text("\n".join(str(one.message) for one in found))

    assert fork(body) == 0
    error = "[Errno 28] No space left on device"
    assert said.read_text() == f"standard output cannot be written: {error}"
