"""Signals to a run under real torchrun: to ranks, their data-loader workers and torchrun at once.

A scheduler signals every process of a job step, and torchrun then signals its ranks once more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from megatron_moe.checkpoint import latest_step, verify
from megatron_moe.parallel.launch import PREEMPTED_EXIT_STATUS
from tests.training.launched import ROOT, SECONDS, start, wait_for_steps
from tests.training.tiny import MODEL


@pytest.mark.parametrize(
    ("workers", "flags"),
    [
        (2, ["--async-save", "--save-interval", "3"]),
        pytest.param(0, [], marks=pytest.mark.slow),
        pytest.param(1, ["--exit-signal", "INT"], marks=pytest.mark.slow),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(1, ["--async-save", "--save-interval", "3"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_every_process_saves_once(corpus, tmp_path, workers, flags):
    own = ["--exit-signal-handler", "--num-workers", str(workers), *flags]
    run = start(corpus, tmp_path, *own)
    try:
        wait_for_steps(run, tmp_path / "metrics.jsonl", 5)
        launcher = psutil.Process(run.pid)
        processes = launcher.children(recursive=True)
        assert len(processes) >= 2 + 2 * workers
        number = signal.SIGINT if "INT" in flags else signal.SIGTERM
        for process in [launcher, *processes]:
            process.send_signal(number)
        assert run.wait(SECONDS) == PREEMPTED_EXIT_STATUS
    finally:
        run.kill()
    log = (tmp_path / "log").read_text()
    (exiting,) = [line for line in log.splitlines() if line.startswith(" exiting at iteration ")]
    step = int(exiting.split()[3].rstrip(":"))
    assert exiting.endswith(number.name)
    assert log.count(f" saved iteration {step} to ") == 1
    assert latest_step(tmp_path / "ckpt") == step
    verify(tmp_path / "ckpt")
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=pytest.mark.slow), ["--exit-signal-handler"]]
)
def test_a_rank_that_fails_ends_although_its_workers_ignore_signals(corpus, tmp_path, flags):
    """Python waits at its exit for worker processes, which it asks to end by SIGTERM."""
    program = (
        "import sys, pretrain_openmoe\n"
        "from megatron_moe.training.trainer import Trainer\n"
        "def fails(trainer): raise RuntimeError('in the middle of a step')\n"
        "Trainer.report = fails\n"
        "pretrain_openmoe.main(sys.argv[1:])\n"
    )
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "8", "--log-interval", "2", *flags]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv, "--num-workers", "1", "--device-peak-tflops", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, "in the middle of a step" in done.stderr) == (1, True)
