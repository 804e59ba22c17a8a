"""Who failed, under real torchrun: each kind of failure is named, and the collectives that wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.launched import ROOT, start, wait_for_steps
from tests.training.tiny import write_corpus

DEFAULT = {"collective": "all_reduce", "group": "default", "ranks": [1], "group_ranks": [0, 1, 2]}
SUMMARY = {
    "kill": "ended: killed",
    "hang": "waits in no collective",
    "stop": "is stopped",
    "raise": "raised ValueError: planted",
}
EXPERT = {"collective": "all_reduce", "group": "expert", "ranks": [0], "group_ranks": [0, 2]}


def run(directory: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Three ranks of `failing_program`, of which rank 2 fails: the report, and standard error."""
    program = ["-m", "tests.faults.failing_program", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", "3", "--shutdown-timeout", "5", "--max-restarts", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    return json.loads((directory / "failure-report.json").read_text()), done.stderr


@pytest.mark.parametrize(
    ("what", "cause", "timeout"),
    [
        pytest.param("kill", "ended", [], marks=pytest.mark.slow),
        ("hang", "waits in no collective", ["4"]),
        pytest.param("stop", "stopped", ["4"], marks=pytest.mark.slow),
        pytest.param("raise", "exception", [], marks=pytest.mark.slow),
    ],
)
def test_the_rank_and_the_collectives_that_wait_for_it_are_named(tmp_path, what, cause, timeout):
    report, log = run(tmp_path, what, "2", str(tmp_path), *timeout)
    assert (report["cause"], report["ranks"]) == (cause, [2])
    assert sorted(report["waits"], key=str) == sorted([DEFAULT, EXPERT], key=str)
    assert f"run failed: rank 2 {SUMMARY[what]}" in log
    assert "waits in all_reduce of the expert group (ranks 0, 2)" in log
    assert [answer["doing"] for answer in report["answers"]] == ["step 3"] * len(report["answers"])
    if what == "hang":
        assert any("go_wrong" in line for line in report["answers"][2]["stacks"]["MainThread"])
        assert "go_wrong" in log
    if what == "raise":
        errors = [line for line in log.splitlines() if "ValueError" in line]
        first, *_, last = [line for line in errors if not line.startswith(" ")]
        assert first == last == "ValueError: planted"
        assert "Connection closed" not in log  # the other ranks' errors, which follow from it


@pytest.mark.slow
def test_a_rank_that_is_stopped_at_the_start_is_named(tmp_path):
    report, log = run(tmp_path, "stop at start", "2", str(tmp_path))
    assert (report["cause"], report["ranks"]) == ("stopped", [2])
    assert "run failed: rank 2 is stopped" in log
    assert "DistStoreError" not in log


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_training_is_named(tmp_path):
    """In a whole run, where collectives are called by Megatron-Core and the experts' exchange."""
    training = start(write_corpus(tmp_path / "corpus"), tmp_path, "--hang-timeout", "20")
    try:
        wait_for_steps(training, tmp_path / "metrics.jsonl", 3)
        ranks = {int(p.environ()["RANK"]): p for p in psutil.Process(training.pid).children()}
        ranks[1].suspend()
        assert training.wait(240) == 1
    finally:
        training.kill()
    report = json.loads((tmp_path / "ckpt" / "failure-report.json").read_text())
    assert (report["cause"], report["ranks"]) == ("stopped", [1])
    (wait,) = report["waits"]
    assert (wait["ranks"], wait["group_ranks"]) == ([0], [0, 1])
    assert "run failed: rank 1 is stopped" in (tmp_path / "log").read_text()
    assert not psutil.wait_procs(ranks.values(), timeout=30)[1]
