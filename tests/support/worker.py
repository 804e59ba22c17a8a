"""A process of the pool: imports everything once, then runs the tasks that it receives.

Started by `tests.support.pool` with two arguments: one end of a socket pair, and a file for the
traceback of a process that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST_GROUPS = 24
"""Process groups that may outlive their call: Megatron-Core's checkpoint writer keeps one of each
call. A run that something still refers to leaves all of its groups."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call on one rank."""

    module: str
    function: str
    rank: int
    world_size: int
    port: int
    """Of the store that the parent serves."""
    prefix: str
    """Of this call's keys in that store."""
    timeout: float
    """Seconds a collective may wait."""
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a task: its result, or the traceback of its failure."""

    result: Any = None
    error: str | None = None
    kind: str = ""
    """Name of the exception's class."""
    finished: float = 0.0
    """`time.monotonic` when it failed, to tell the first failure from those it caused."""
    clean: bool = True
    """Whether the process could be put back to its initial state."""


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    with open(sys.argv[2], "w") as dump:
        faulthandler.register(signal.SIGUSR1, file=dump, all_threads=True)
        _prepare()
        connection.send_bytes(b"ready")
        while True:
            try:
                task = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(run(task)))


def _prepare() -> None:
    import torch

    from megatron_moe.platform import activate

    torch.set_num_threads(1)
    activate()


def run(task: Task) -> Outcome:
    """Run one task between setting a default process group up and taking everything down."""
    try:
        _initialize(task)
        function: Any = importlib.import_module(task.module)
        for part in task.function.split("."):
            function = getattr(function, part)
        outcome = Outcome(result=function(task.rank, task.world_size, **task.kwargs))
    except BaseException as error:
        outcome = Outcome(
            error=traceback.format_exc(), kind=type(error).__name__, finished=time.monotonic()
        )
    try:
        _clean_up()
    except BaseException:
        text = outcome.error or "the call itself succeeded, taking the groups down did not:\n"
        return Outcome(
            error=text + traceback.format_exc(),
            kind=outcome.kind or "CleanUp",
            finished=outcome.finished or time.monotonic(),
            clean=False,
        )
    return outcome


def _initialize(task: Task) -> None:
    import torch
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    torch.manual_seed(1234)
    timeout = timedelta(seconds=task.timeout)
    store = TCPStore("127.0.0.1", task.port, is_master=False, timeout=timeout)
    init_process_group(
        "gloo",
        store=PrefixStore(task.prefix, store),
        rank=task.rank,
        world_size=task.world_size,
        timeout=timeout,
    )


def _clean_up() -> None:
    import torch

    from megatron_moe.parallel.context import destroy_parallel

    destroy_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    _end_children()
    # Transformer Engine, where a process has it, remembers the size of every group it has seen.
    if (te := sys.modules.get("transformer_engine.pytorch.distributed")) is not None:
        te.get_distributed_world_size.cache_clear()
        te.get_distributed_rank.cache_clear()
    gc.collect()
    # Each wakes a hundred times in a second: those of a hundred tests would take both cores.
    left = _gloo_threads()
    assert left < MOST_GROUPS, f"{left} process groups outlive calls: something refers to them"


def _end_children() -> None:
    """End the process that Megatron-Core's writer of distributed checkpoints keeps a queue in.

    It would outlive this one, which is killed at the end. Workers of data loaders end with them.
    """
    for child in multiprocessing.active_children():
        if child.name.startswith("SyncManager"):
            child.kill()
            child.join()
    writer = sys.modules.get("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if writer is not None:
        writer._results_queue = None  # type: ignore[attr-defined]


def _gloo_threads() -> int:
    """Threads of process groups in this process."""
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ends
            found += path.read_text().startswith("gloo_tcp")
    return found
