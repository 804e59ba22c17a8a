"""Processes that end with the one that started them, and the ranks of this node as processes.

A rank whose launcher was killed would train on beside the restart, and a data-loader worker that is
stopped when its rank ends would stay for ever. Linux ends both: a process can ask for a signal at
the death of its parent (prctl(2), PR_SET_PDEATHSIG), which reaches a stopped process as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping

import psutil

_PR_SET_PDEATHSIG = 1
STOPPED = "stopped"
ENDED = "ended"


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent ends; elsewhere than on Linux nothing.

    The parent is the *thread* that started this process: the main thread, or one that lives as
    long.

    Args:
        parent: process id of the parent. If it has ended already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call, of which there will be no signal
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Let this rank be killed when its torchrun ends, by whatever signal.

    Where torchrun starts a shell that starts the rank, a thread waits for torchrun's end.
    Other launchers are not watched: ranks that a shell starts in the background shall outlive it.

    Args:
        environment: of this process; without torchrun's variables nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return
    launcher = _launcher(psutil.Process(), environment)
    if launcher is None or launcher.pid == os.getppid():
        end_with_parent(os.getppid())
        return
    with contextlib.suppress(OSError):  # no pidfd_open(2) before Linux 5.3
        watched = os.pidfd_open(launcher.pid)
        threading.Thread(target=_end_after, args=(watched,), name="launcher", daemon=True).start()


def _launcher(process: psutil.Process, environment: Mapping[str, str]) -> psutil.Process | None:
    """The nearest ancestor without this rank's variables; `None` if it cannot be found."""
    with contextlib.suppress(psutil.Error):
        for ancestor in process.parents():
            if ancestor.environ().get("RANK") != environment.get("RANK"):
                return ancestor
    return None


def _end_after(watched: int) -> None:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def lost_ranks(environment: Mapping[str, str]) -> dict[int, str]:
    """Other ranks of this node that cannot answer, `STOPPED` or `ENDED`.

    Args:
        environment: of this process. Ranks are found among the processes of the same parent; a rank
            that a shell between torchrun and itself hides is never reported.
    """
    mine = int(environment.get("RANK", "0"))
    first = mine - int(environment.get("LOCAL_RANK", "0"))
    expected = range(first, first + int(environment.get("LOCAL_WORLD_SIZE", "1")))
    states: dict[int, str] = {}
    siblings: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        siblings = psutil.Process(os.getppid()).children()
    for process in siblings:
        with contextlib.suppress(psutil.Error, KeyError, ValueError):  # no rank
            status = process.status()
            if status == psutil.STATUS_ZOMBIE:
                continue
            rank = int(process.environ()["RANK"])
            states[rank] = STOPPED if status == psutil.STATUS_STOPPED else ""
    if mine not in states:  # the parent is a shell, or its processes cannot be read
        return {}
    return {r: states.get(r, ENDED) for r in expected if r != mine and states.get(r, ENDED)}
