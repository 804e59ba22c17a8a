"""Signals that ask a run to exit, and the worker processes of its ranks.

A scheduler sends its signal to every process of a job step, and a terminal its Ctrl-C to the whole
foreground process group: to ranks and to their data-loader workers. A worker that ended by it would
end its rank in the middle of a step, before anything is saved. So workers never receive these
signals; a worker whose rank is gone ends by itself, because `torch.utils.data` looks for its
parent.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers, launchers and terminals send to ask for an exit."""


@contextmanager
def exit_signals_blocked() -> Iterator[None]:
    """Hold back exit signals of this thread, and of the processes that it starts meanwhile.

    A process inherits the signals that are blocked when it is started, and keeps them blocked:
    there is no moment at its start in which a signal could end it. This process receives at the end
    those that arrived meanwhile.
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
