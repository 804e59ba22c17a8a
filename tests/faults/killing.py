"""Children that are killed at a chosen point, and checks of what they leave."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from megatron_moe.checkpoint import CheckpointError, latest_step, verify
from megatron_moe.checkpoint.directory import revisions, step_directory
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy

Save = Callable[..., object]
"""`toy.save` or `toy.save_async`."""
POINTS = 200
"""More than a save has; loops end when a save survives."""


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(start_fork(body), 0)[1])


def start_fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a child; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_at(event: int, directory: Path) -> None:
    """From now on, be killed before the given change or opening of something below a directory."""
    seen = 0
    prefix = str(directory)

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if name not in watched or not str(arguments[0]).startswith(prefix):
            return
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)


def check_whole(directory: Path, old: int, new: int) -> int:
    """The next start finds a complete checkpoint, the old or the new; which one."""
    step = latest_step(directory)
    assert step in (old, new)
    for present in revisions(directory):
        verify(directory, present)
    local, _ = toy.load(step_directory(directory)[1])
    for shard in local:
        assert torch.equal(shard.param, toy.logical(step)[shard.local_name])
    return step


def fork_ranks(body: Callable[[RankGroup], None], scratch: Path) -> list[int]:
    """Run ``body`` on two ranks of a gloo group; their exit statuses, 3 for an error."""

    def child(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = torch.distributed.FileStore(str(scratch), 2)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30)
        )
        try:
            body(RankGroup(rank, 2))
        except (CheckpointError, RuntimeError):
            os._exit(3)

    scratch.unlink(missing_ok=True)
    children = [start_fork(partial(child, rank)) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
