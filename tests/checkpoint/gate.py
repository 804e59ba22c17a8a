"""Threads of asynchronous saves held back until a test lets them go."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

TIMEOUT = 60.0


def hold_writers(directory: Path) -> threading.Event:
    """From now on no thread but the main one opens files below a directory, until the event is set.

    A thread that would write from tensors rather than from its copy meets what is there by then.
    """
    gate, prefix = threading.Event(), str(directory)

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        if name != "open" or threading.current_thread() is threading.main_thread():
            return
        if str(arguments[0]).startswith(prefix):
            gate.wait(TIMEOUT)

    sys.addaudithook(watch)
    return gate
