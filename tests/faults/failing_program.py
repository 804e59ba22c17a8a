"""A program that `test_failures.py` starts under torchrun: what goes wrong, and on which rank.

python -m tests.faults.failing_program WHAT RANK DIRECTORY [HANG_TIMEOUT]
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moe.parallel.failures import FailureMonitor
from megatron_moe.parallel.launch import launched, run_or_exit, startup_barrier

START_SECONDS = 12.0
"""Time limit of the start."""
STEPS = 3


def go_wrong(what: str) -> None:
    """Be killed, be stopped, raise an error, or do something for ever."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("stop", "stop at start"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "raise":
        raise ValueError("planted")
    while what == "hang":
        time.sleep(0.01)


def main() -> None:
    what, victim, directory, *timeout = sys.argv[1:]
    here = launched()
    hang_timeout = float(timeout[0]) if timeout else None
    if (here.rank, what) == (int(victim), "stop at start"):
        go_wrong(what)
    with FailureMonitor(here, Path(directory), hang_timeout) as monitor:
        store, rank = startup_barrier(here.world_size, timedelta(seconds=START_SECONDS))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=here.world_size)
        pairs = [dist.new_group(pair, group_desc="EXPERT_GROUP") for pair in ([0, 2], [1])]
        for step in range(1, STEPS + 1):
            monitor.beat(f"step {step}")
            if step == STEPS and rank == int(victim):
                go_wrong(what)
            if rank != 1:  # so that rank 0 waits for rank 2, and 1 for both
                dist.all_reduce(torch.ones(1), group=pairs[0])
            dist.all_reduce(torch.ones(1))
        monitor.beat("the end", watched=False)
        dist.destroy_process_group()


if __name__ == "__main__":
    run_or_exit(main, prog="program")
