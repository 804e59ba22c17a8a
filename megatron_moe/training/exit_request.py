"""Requests to save and exit early: a signal, the time a run may take, or a file.

All ranks must leave after the same step. One rank may be in step 7 when another already takes step
8, and a rank that left at once would leave the others waiting in a collective. So a rank only notes
a request, and after every step all ranks ask whether any of them has one.

One request reaches a rank several times: Slurm signals every process of a job step, and torchrun,
which is one of them, signals its ranks again. Only a signal that comes much later, while nothing is
being saved, means that the run shall end now.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil

from megatron_moe.checkpoint.manager import host_rank_group
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.training.phases import RunSchedule

REPEAT_SECONDS = 10.0
"""Signals within this time of the first are the same request."""


class ExitRequest:
    """Whether the ranks shall save and exit, the same answer on all of them.

    The handler is installed from construction to `close`, in this process alone.

    Args:
        ranks: the ranks that exit together; over a host group, so that asking does not wait for the
            device.
        number: the signal; `None` listens to none.
        minutes: how long the process may run, from its start; `None` for any time.
        saving: whether a save is in progress, which no signal interrupts.
        file: its existence is a request; `None` for no file.
    """

    def __init__(
        self,
        ranks: RankGroup,
        number: signal.Signals | None = signal.SIGTERM,
        minutes: float | None = None,
        saving: Callable[[], bool] = lambda: False,
        file: str | None = None,
    ) -> None:
        self._ranks, self._number, self._minutes = ranks, number, minutes
        self._saving, self._file = saving, file
        self._noted = False
        if number is not None:
            self._install(number)

    def agreed(self) -> str:
        """The request of any rank, e.g. `SIGTERM`; empty if there is none.

        The same on all ranks, which call it together.
        """
        late = self._minutes is not None and _minutes_since_start() >= self._minutes
        # One rank looks: a thousand would ask a shared file system after every step.
        exists = self._file is not None and self._ranks.rank == 0 and os.path.exists(self._file)
        noted, late_ranks, seen = self._ranks.all_reduce_sum(self._noted, late, exists)
        if noted and self._number is not None:
            return self._number.name
        if seen:
            return f"--kill-switch-file {self._file}"
        return f"--exit-duration-in-mins {self._minutes:g}" if late_ranks else ""

    def close(self) -> None:
        """Restore the handler from before."""
        if self._number is None:
            return
        signal.signal(self._number, self._before)
        signal.set_wakeup_fd(self._wakeup_before)
        # Ends the thread, also where workers that were forked later have the socket as well.
        self._sender.shutdown(socket.SHUT_WR)
        self._sender.close()
        self._thread.join()

    def _install(self, number: signal.Signals) -> None:
        # Python runs handlers between two instructions of the main thread, which may be waiting in
        # a collective for ranks that are gone. The thread reads signals as they arrive, so a second
        # request ends a rank that hangs.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="exit-request", daemon=True)
        self._thread.start()
        self._before: Any = signal.signal(number, self._note)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _leave(this()))

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._noted = True

    def _watch(self) -> None:
        first = None
        while data := self._receiver.recv(1):
            if data[0] != self._number:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > REPEAT_SECONDS and not self._saving():
                os._exit(128 + data[0])
        self._receiver.close()

    def leave_child(self) -> None:
        """In a process forked from the rank: signals are its own again, and mean what they did."""
        if self._number is not None and signal.getsignal(self._number) == self._note:
            signal.set_wakeup_fd(-1)
            signal.signal(self._number, self._before)


def _leave(request: ExitRequest | None) -> None:
    if request is not None:
        request.leave_child()


def _minutes_since_start() -> float:
    """Minutes since this process started: imports and loading count as well."""
    return (time.time() - psutil.Process().create_time()) / 60


def build_exit_request(
    schedule: RunSchedule, ctx: ParallelContext, saving: Callable[[], bool]
) -> ExitRequest | None:
    """The request that the flags ask for, if any; called by all ranks together.

    Args:
        schedule: the run, with its flags.
        ctx: this rank.
        saving: whether a save is in progress on this rank.
    """
    train = schedule.config.train
    other = (train.exit_duration_in_mins, train.kill_switch_file)
    if not train.exit_signal_handler and other == (None, None):
        return None
    number = signal.Signals[f"SIG{train.exit_signal}"] if train.exit_signal_handler else None
    timeout = timedelta(minutes=schedule.config.parallel.distributed_timeout_minutes)
    ranks = host_rank_group(ctx, timeout)
    return ExitRequest(ranks, number, train.exit_duration_in_mins, saving, train.kill_switch_file)
