"""A pool of ranks: processes that import torch and Megatron-Core once and then serve many tests.

    def body(rank, world_size, *, tp):          # a top-level function of a module under tests/
        return tensor_on_this_rank

    def test_something(pool):
        results = pool.run(body, 4, tp=2)       # one result per rank

Each call gets a new default gloo group; at its end, groups and Megatron-Core's state are destroyed.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.worker import Outcome, Task

ROOT = Path(__file__).resolve().parents[2]
MAX_WORKERS = 8
DEFAULT_TIMEOUT = 120.0
START_TIMEOUT = 120.0
GRACE = 10.0
"""Seconds that the other ranks have to end after the first one failed."""
_START = "from tests.support.worker import main; main()"
"""Imported, not run as a script: its classes are pickled under the module's own name."""


class RemoteError(AssertionError):
    """A call failed on some rank, or did not come back."""

    def __init__(self, message: str, rank: int, kind: str) -> None:
        super().__init__(message)
        self.rank = rank
        """The rank that failed first."""
        self.kind = kind
        """Class name of its exception, `Hang` or `Death`."""


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, index: int, directory: Path, start: str) -> None:
        ours, theirs = socket.socketpair()
        self.dump = directory / f"traceback-{index}.txt"
        self.log = directory / f"log-{index}.txt"
        environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", start, str(theirs.fileno()), str(self.dump)],
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self.connection = Connection(ours.detach())

    def wait_ready(self) -> None:
        try:
            if self.connection.poll(START_TIMEOUT) and self.connection.recv_bytes() == b"ready":
                return
        except (EOFError, ConnectionError):
            pass
        raise RuntimeError(f"a rank of the pool did not start:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def traceback(self) -> str:
        """Where the process is now."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        return self.dump.read_text(errors="replace") if self.dump.exists() else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Pool:
    """Grows to the largest world that was asked for; survives tests that fail, hang or crash.

    Args:
        start: the code that each process runs.
    """

    def __init__(self, start: str = _START) -> None:
        self._start = start
        self._workers: list[_Worker] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self._count = itertools.count()
        self._store: Any = None

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(rank, world_size, **kwargs)` on every rank.

        Args:
            fn: a top-level function of a module in this repository.
            world_size: ranks, at most 8.
            timeout: seconds for the whole call, and for any one collective.
            kwargs: picklable.

        Returns:
            What it returned on rank 0, 1, ...

        Raises:
            RemoteError: it raised, hung or died on some rank; the message holds the traceback of
                the rank that failed first.
        """
        workers = self._ready_workers(world_size)
        prefix = f"call-{next(self._count)}"
        for rank, worker in enumerate(workers):
            task = Task(
                module=_module_name(fn),
                function=fn.__qualname__,
                rank=rank,
                world_size=world_size,
                port=self._store.port,
                prefix=prefix,
                timeout=timeout,
                kwargs=kwargs,
            )
            worker.connection.send_bytes(pickle.dumps(task))
        outcomes = self._collect(workers, timeout)
        failed = {rank: o for rank, o in outcomes.items() if o.error is not None}
        if failed or len(outcomes) < world_size:
            raise self._failure(fn, workers, outcomes, failed)
        return [outcomes[rank].result for rank in range(world_size)]

    def close(self) -> None:
        """End all processes."""
        self._rebuild()
        self._store = None
        self._directory.cleanup()

    def _ready_workers(self, count: int) -> list[_Worker]:
        if not 1 <= count <= MAX_WORKERS:
            raise ValueError(f"a world of {count} ranks; the pool has 1 to {MAX_WORKERS}")
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        new = range(len(self._workers), count)
        started = [_Worker(next(self._count), Path(self._directory.name), self._start) for _ in new]
        self._workers += started
        try:
            for worker in started:
                worker.wait_ready()
        except BaseException:
            self._rebuild()
            raise
        return self._workers[:count]

    def _collect(self, workers: list[_Worker], timeout: float) -> dict[int, Outcome]:
        """Outcomes by rank; ranks that died, hung, or hung after another's failure are missing."""
        outcomes: dict[int, Outcome] = {}
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + timeout
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), timeout=left):
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                    healthy = outcomes[rank].error is None
                except (EOFError, ConnectionError):
                    healthy = False
                if not healthy:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return outcomes

    def _failure(
        self,
        fn: Callable[..., Any],
        workers: list[_Worker],
        outcomes: dict[int, Outcome],
        failed: dict[int, Outcome],
    ) -> RemoteError:
        missing = [rank for rank in range(len(workers)) if rank not in outcomes]
        dead = [rank for rank in missing if workers[rank].process.poll() is not None]
        if failed:
            rank = min(failed, key=lambda r: failed[r].finished)
            kind, text = failed[rank].kind, failed[rank].error or ""
        else:
            rank = (dead or missing)[0]
            kind = "Death" if dead else "Hang"
            text = "" if dead else workers[rank].traceback()
            text += f"\nlog:\n{workers[rank].log_tail()}"
        if missing or not all(o.clean for o in outcomes.values()):
            self._rebuild()
        others = f", also failed: {sorted(set(failed) - {rank})}" if len(failed) > 1 else ""
        gone = f", no answer from: {missing}" if missing else ""
        header = f"{fn.__qualname__} on rank {rank} of {len(workers)}: {kind}{others}{gone}"
        return RemoteError(f"{header}\n{text}", rank, kind)

    def _rebuild(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []


def _module_name(fn: Callable[..., Any]) -> str:
    """Dotted name below the repository's root, whatever pytest imported the module as."""
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not a top-level function")
    path = getattr(sys.modules[fn.__module__], "__file__", None)
    if path is None or not Path(path).resolve().is_relative_to(ROOT):
        return fn.__module__
    return ".".join(Path(path).resolve().relative_to(ROOT).with_suffix("").parts)
