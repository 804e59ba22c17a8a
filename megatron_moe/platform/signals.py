"""Signals that ask a run to exit, and the worker processes of its ranks.

A scheduler sends its signal to every process of a job step, and a terminal its Ctrl-C to the whole
foreground process group: to ranks and to their data-loader workers. A worker that ended by it would
end its rank in the middle of a step, before anything is saved. So workers never receive these
signals; a worker whose rank is gone ends by itself, because `torch.utils.data` looks for its
parent.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import multiprocessing
import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers, launchers and terminals send to ask for an exit."""


@contextmanager
def exit_signals_blocked() -> Iterator[None]:
    """Hold back exit signals of this thread, and of the processes that it starts meanwhile.

    A process inherits the signals that are blocked when it is started, and keeps them blocked:
    there is no moment at its start in which a signal could end it. This thread receives at the end
    those that arrived for it meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def end_workers_at_exit() -> None:
    """Let the worker processes of this one end with it; calls after the first do nothing.

    At its exit Python sends SIGTERM to the worker processes that are left, as after an error in the
    middle of a step, and waits for them. Those that were started under `exit_signals_blocked` never
    receive it, and the rank would wait for ever.
    """
    # Runs before Python's own, which was registered earlier.
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports every worker that is killed
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class SignalThread:
    """Calls a function in a thread as soon as a signal arrives.

    Python runs handlers between two instructions of the main thread, which may be waiting in a
    collective for ranks that are gone. The thread reads signals as they arrive. Several of these
    may exist, each for a signal of its own or, until it is closed, in place of an earlier one.
    From construction to `close`, in this process alone: processes that are forked meanwhile get the
    signal's earlier meaning. To be constructed and closed by the main thread.

    Args:
        number: the signal.
        arrived: called in the thread, for each arrival.
        note: called in the main thread, between two of its instructions.
    """

    def __init__(
        self,
        number: signal.Signals,
        arrived: Callable[[], None],
        note: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = number
        self._arrived, self._note = arrived, note
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name=number.name, daemon=True)
        self._thread.start()
        self._before: Any = signal.signal(number, self._handle)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _leave(this()))

    def close(self) -> None:
        """Restore the handler from before."""
        signal.signal(self.number, self._before)
        signal.set_wakeup_fd(self._wakeup_before)
        # Ends the thread, also where workers that were forked later have the socket as well.
        self._sender.shutdown(socket.SHUT_WR)
        self._sender.close()
        self._thread.join()

    def leave_child(self) -> None:
        """In a process forked from this one: signals are its own again, and mean what they did."""
        if signal.getsignal(self.number) == self._handle:
            signal.set_wakeup_fd(-1)
            before = self._before
            while isinstance(earlier := getattr(before, "__self__", None), SignalThread):
                before = earlier._before
            signal.signal(self.number, before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._note()

    def _watch(self) -> None:
        while data := self._receiver.recv(1):
            if data[0] == self.number:
                self._arrived()
            elif self._wakeup_before != -1:  # another one's
                os.write(self._wakeup_before, data)
        self._receiver.close()


def _leave(signals: SignalThread | None) -> None:
    if signals is not None:
        signals.leave_child()


def end_by(number: signal.Signals) -> None:
    """End this process by a signal as if it had no handler; from any thread."""
    ctypes.CDLL(None).signal(number, 0)  # Python's own function works in the main thread alone
    os.kill(os.getpid(), number)
