"""A task that ends its process; alone here, so that a worker imports nothing else for it."""

from __future__ import annotations

import os
import signal


def die(*_: object) -> None:
    """As the kernel ends a process when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
