"""SIGTERM as a request to save and end, taken up by all ranks after the same step.

A scheduler that wants its nodes back, or torchrun when it is ended, sends it to every rank, but to
each at another moment. A rank only notes it; after every step all ranks ask whether any has.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from megatron_moe.parallel.collectives import RankGroup


class ExitSignal:
    """Notes SIGTERM from its making to `close`. A second SIGTERM ends the process at once.

    Args:
        ranks: who end together; over a group on the host, so that asking waits for no device.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks, self._noted = ranks, False
        self._owner = os.getpid()
        self._before: Any = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._owner:  # a loader's process, which inherited this
            os.kill(os.getpid(), number)
        self._noted = True

    def agreed(self) -> bool:
        """Whether any rank was asked to end; the same answer on all, who call this together."""
        return self._ranks.all_reduce_sum(self._noted)[0] > 0

    def close(self) -> None:
        """Back to what SIGTERM did before."""
        signal.signal(signal.SIGTERM, self._before)
