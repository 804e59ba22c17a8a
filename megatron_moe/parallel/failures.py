"""Find out why a run fails, on all ranks together, and end them.

A thread of each rank waits until any rank has found that something failed: an exception, a rank
that is gone, or `--hang-timeout`. Then every rank answers what it does and where it waits, the
first of them makes the report, and all end with code 1. While nothing fails, the thread sleeps in
one request to the launcher's store: one more connection for each rank, no messages, and nothing in
a step but the note of its number.

torchrun sends SIGTERM to the other ranks as soon as it finds one that ended. They answer before
they end. A SIGTERM from elsewhere, as to cancel a job, ends a rank at once, as without this.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.failure_report import (
    COLLECTIVE,
    EXCEPTION,
    HANG,
    TERMINATED,
    WAKED,
    Answer,
    Report,
    report_of,
)
from megatron_moe.parallel.launch import STARTUP_TIMEOUT, Launched, launcher_store
from megatron_moe.parallel.waiting import (
    Wait,
    current_wait,
    frames_of_error,
    pending_collectives,
    stacks,
    wait_in,
)
from megatron_moe.platform.signals import SignalThread, end_by
from megatron_moe.processes import lost_ranks

_SLEEP = timedelta(days=20)
"""Of the request in which the thread sleeps: nearly the longest that a store can wait."""
_REQUEST = timedelta(seconds=5)
"""Of other requests."""
ANSWERS_SECONDS = 8.0
"""How long the first rank waits for the answers of the others."""
_WRITE_SECONDS = 5.0
_LEAVE = timedelta(seconds=20)
"""How long the others wait for the report."""
_UNWIND = 0.5
"""Seconds after which a thread that was waiting in a collective shows that it waits, or has raised
the error of the collective."""


class FailureMonitor:
    """Watches the run of this rank while the context is entered; see the module.

    An exception that leaves the context ends the process with code 1, after the report. Usage
    errors, which all ranks report in their own way, and exits pass through.

    Args:
        here: this rank.
        directory: of `failure-report.json`; `None` for a summary in the log alone.
        hang_timeout: seconds between two calls of `beat` that are a failure; `None` for any.
        connect: returns a new connection to a store that all ranks share.
    """

    def __init__(
        self,
        here: Launched,
        directory: Path | None,
        hang_timeout: float | None = None,
        connect: Callable[[timedelta], Any] | None = None,
    ) -> None:
        self._here, self._directory, self._hang = here, directory, hang_timeout
        store = dist.HashStore() if here.alone else None
        # The stubs of torch lack methods of stores.
        self._connect: Callable[[timedelta], Any] = connect or (
            lambda t: store or launcher_store("failure", t)
        )
        self._doing, self._since, self._clock_runs = "the start of the run", time.monotonic(), False
        self._once, self._handled, self._closing = threading.Lock(), False, threading.Event()
        self._signals: SignalThread | None = None

    def beat(self, doing: str, *, watched: bool = True) -> None:
        """Note that the rank begins something: this is progress.

        Args:
            doing: e.g. `step 17`.
            watched: whether it may take no longer than `hang_timeout`.
        """
        self._doing, self._since, self._clock_runs = doing, time.monotonic(), watched

    def __enter__(self) -> FailureMonitor:
        self._store = self._connect(STARTUP_TIMEOUT)
        self._threads = [threading.Thread(target=self._wait_for_others, name="failures")]
        if self._hang is not None:
            own = threading.Thread(target=self._wait_for_hang, args=(self._hang,), name="hang")
            self._threads.append(own)
        for thread in self._threads:
            thread.daemon = True
            thread.start()
        # A process alone has no ranks to name, and its signals are its own.
        if not self._here.alone and threading.current_thread() is threading.main_thread():
            self._signals = SignalThread(signal.SIGTERM, self._terminated)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, UsageError):
            if self._here.alone:  # Python prints the exception
                self._write(report_of([self._answer(EXCEPTION, error)], 1))
            else:
                self._handle(_reason_of(error), error)
                sys.exit(1)
        self._closing.set()
        with contextlib.suppress(dist.DistError, RuntimeError):  # the launcher may be gone
            store = self._connect(_REQUEST)
            if error is not None:
                store.set("ending", "1")
            store.set(self._key(self._here.rank), "1")
            for thread in self._threads:
                thread.join()
        if self._signals is not None:
            self._signals.close()

    def _key(self, rank: int) -> str:
        return f"wake/{rank}"

    def _wait_for_others(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):  # the launcher is gone
            self._store.wait([self._key(self._here.rank)], _SLEEP)
            self._end(WAKED)

    def _wait_for_hang(self, seconds: float) -> None:
        left = seconds
        while not self._closing.wait(left):
            left = seconds - (time.monotonic() - self._since) if self._clock_runs else seconds
            if left <= 0:
                self._end(HANG)
                return

    def _end(self, reason: str) -> None:
        if not self._closing.is_set() and self._handle(reason):
            os._exit(1)

    def _terminated(self) -> None:
        """SIGTERM; called in a thread."""
        lost = lost_ranks(os.environ)
        with contextlib.suppress(dist.DistError, RuntimeError):
            store = self._connect(_REQUEST)
            if not store.check(["ending"]) and (lost or store.check(["failed"])):
                self._handle(TERMINATED)
                os._exit(1)
            # Ranks that are signalled together must not take each other's end for a failure.
            store.set("ending", "1")
        end_by(signal.SIGTERM)

    def _handle(self, reason: str, error: BaseException | None = None) -> bool:
        """Answer, and report if this rank is the first; the process may end afterwards.

        Returns:
            Whether this thread did so; `False` if another thread of this rank has.
        """
        if reason == WAKED:
            time.sleep(_UNWIND)
        with self._once:
            if self._handled:
                return False
            self._handled = True
            try:
                self._answer_and_report(reason, error)
            except (dist.DistError, RuntimeError) as broken:
                # No store, no report of all ranks: this one says what it knows.
                alone = report_of([self._answer(reason, error)], self._here.world_size)
                lines = [_text_of(error), f"no report of all ranks: {broken}", *alone.lines()]
                _print("\n".join(lines) + "\n")
            return True

    def _answer_and_report(self, reason: str, error: BaseException | None) -> None:
        store = self._connect(_REQUEST)
        if reason == EXCEPTION and _first(store, _text_of(error)):
            _print(_text_of(error))
        if store.add("failed", 1) == 1:
            keys = [self._key(rank) for rank in range(self._here.world_size)]
            store.multi_set(keys, ["1"] * len(keys))
        store.append("answers", self._answer(reason, error).to_json() + "\n")
        store.add("answered", 1)
        if store.add("reporter", 1) == 1:
            self._report(store)
            store.set("reported", "1")
        else:
            store.wait(["reported"], _LEAVE)
        if self._here.rank == 0:
            time.sleep(1)  # it may serve the store, which the others still read

    def _answer(self, reason: str, error: BaseException | None) -> Answer:
        pending = pending_collectives()
        wait: Wait | None = _wait_of(error) if error is not None else current_wait()
        if wait is None and isinstance(error, dist.DistError):
            wait = Wait(operation="the rendezvous", group="default", ranks=())
        return Answer(
            rank=self._here.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            reason=reason,
            doing=self._doing,
            seconds=round(time.monotonic() - self._since, 1),
            wait=wait,
            error=_text_of(error),
            lost=lost_ranks(os.environ),
            stacks=stacks() if error is None else {},
            pending=pending,
        )

    def _report(self, store: Any) -> None:
        deadline = time.monotonic() + ANSWERS_SECONDS
        while True:
            count = store.add("answered", 0)
            answers = [
                Answer.from_json(line) for line in store.get("answers").decode().splitlines()
            ]
            lost = {rank for answer in answers for rank in answer.lost}
            everyone = count >= self._here.world_size - len(lost - {a.rank for a in answers})
            if everyone or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        report = report_of(answers, self._here.world_size)
        path = self._write(report)
        first, *rest = report.lines()
        where = [f"  report: {path}"] if path is not None else []
        _print("\n".join([first, *where, *rest]) + "\n")

    def _write(self, report: Report) -> Path | None:
        if self._directory is None:
            return None
        written: list[Path | None] = []
        directory = self._directory
        # A file system that hangs may be what has failed, and shall not keep the summary back.
        writer = threading.Thread(target=lambda: written.append(report.write(directory)))
        writer.daemon = True
        writer.start()
        writer.join(_WRITE_SECONDS)
        return written[0] if written else None


@contextlib.contextmanager
def failures_watched(here: Launched, config: RunConfig) -> Iterator[FailureMonitor]:
    """Enter a `FailureMonitor`, unless another program has made the process groups of this rank.

    Args:
        here: this rank.
        config: `--save`, where the report is written, and `--hang-timeout`.
    """
    save = config.checkpoint.save
    monitor = FailureMonitor(here, Path(save) if save else None, config.train.hang_timeout)
    if dist.is_initialized():
        yield monitor
    else:
        with monitor:
            yield monitor


def _reason_of(error: BaseException) -> str:
    """An error about other ranks is a consequence of theirs."""
    text = str(error)
    about_ranks = isinstance(error, dist.DistError) or "/gloo/" in text or "NCCL" in text
    return COLLECTIVE if about_ranks else EXCEPTION


def _wait_of(error: BaseException) -> Wait | None:
    return wait_in(frames_of_error(error))


def _text_of(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error is not None else ""


def _first(store: Any, text: str) -> bool:
    """Whether no other rank has printed the same."""
    return store.add(f"printed/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1


def _print(text: str) -> None:
    """In one write, so that the lines of several ranks stay together."""
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
