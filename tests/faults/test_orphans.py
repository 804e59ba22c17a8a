"""No process outlives the one that started it: ranks their launcher, workers their rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_moe.processes import ENDED, STOPPED
from tests.training.launched import ROOT, start, wait_for_steps
from tests.training.tiny import write_corpus

RANK = "import os; from megatron_moe.processes import end_with_launcher as end; end(os.environ); "
SLEEP = "print(os.getpid(), flush=True); import time; time.sleep(60)"
LAUNCHER = """
import os, subprocess, sys
environment = os.environ | {"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
subprocess.run(sys.argv[1:], env=environment)
"""


def launch(*command: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that starts a rank, as torchrun does, and the rank."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    return launcher, psutil.Process(int(launcher.stdout.readline()))


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of them end, in at most as long as a slow machine may need."""
    return not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_ends_with_its_launcher(stopped):
    launcher, rank = launch(sys.executable, "-c", RANK + SLEEP)
    if stopped:
        rank.suspend()
    launcher.kill()
    assert gone([rank])


def test_a_rank_ends_with_a_launcher_that_started_it_through_a_shell():
    launcher, rank = launch("bash", "-c", f'"{sys.executable}" -c "{RANK}{SLEEP}"; exit 0')
    assert rank.ppid() != launcher.pid
    launcher.kill()
    assert gone([rank])


def test_ranks_of_other_launchers_stay():
    command = f'RANK=0 "{sys.executable}" -c "{RANK}{SLEEP}"'
    shell = subprocess.Popen(
        ["bash", "-c", f"{command} & wait"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    rank = psutil.Process(int(shell.stdout.readline()))
    shell.kill()
    shell.wait()
    time.sleep(0.5)
    assert rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
    rank.kill()


def test_a_run_ends_with_torchrun_and_a_stopped_worker_with_its_rank(tmp_path):
    run = start(write_corpus(tmp_path / "corpus"), tmp_path, "--num-workers", "1")
    try:
        wait_for_steps(run, tmp_path / "metrics.jsonl", 3)
        ranks = psutil.Process(run.pid).children()
        workers = [worker for rank in ranks for worker in rank.children()]
        assert (len(ranks), len(workers)) == (2, 2)
        workers[0].suspend()
    finally:
        run.kill()
    assert run.wait() == -signal.SIGKILL
    assert gone([*ranks, *workers])


def test_ranks_of_this_node_that_cannot_answer():
    """Of ranks 4 to 7, the first asks, one is stopped, one has just ended, one has long ended."""
    children = [
        subprocess.Popen(["sleep", "60"], env=os.environ | {"RANK": rank}) for rank in ("5", "6")
    ]
    children[0].send_signal(signal.SIGSTOP)
    children[1].kill()
    asks = "import os; from megatron_moe.processes import lost_ranks as l; print(l(os.environ))"
    found = subprocess.run(
        [sys.executable, "-c", asks],
        cwd=ROOT,
        env=os.environ | {"RANK": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    children[0].kill()
    for child in children:
        child.wait()
    assert found.stdout.strip() == str({5: STOPPED, 6: ENDED, 7: ENDED})
