"""What ranks tell each other before there are process groups, over the launcher's store.

Which checkpoint a run goes on from decides what is built, so it must be known before the groups
are; and a thousand ranks that each read it for themselves would be a thousand readers of one file.
"""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING

from megatron_moe.parallel import launch
from megatron_moe.parallel.launch import MEETING_TIMEOUT, Launched

if TYPE_CHECKING:
    import torch.distributed as dist

_LOOK = timedelta(seconds=2)
"""How often a rank that waits looks whether another has found a mistake and will never answer."""


class Rendezvous:
    """Ranks of a launch; all call the same methods in the same order.

    It must live until the process groups are made: rank 0 may be the one that serves the store.

    Args:
        here: this rank, of several.
        timeout: for the slowest rank.
    """

    def __init__(self, here: Launched, timeout: timedelta) -> None:
        self._here, self._timeout = here, timeout
        self._store: dist.Store = launch._store("start", timeout)
        self._keys = (f"meeting/{number}" for number in count())

    def gather(self, value: str) -> list[str] | None:
        """Every rank's value, in rank order, on rank 0; None on the others."""
        key = next(self._keys)
        if self._here.rank != 0:
            self._store.set(f"{key}/{self._here.rank}", value)
            return None
        others = range(1, self._here.world_size)
        return [value, *(self._hear(f"{key}/{rank}") for rank in others)]

    def broadcast(self, value: str) -> str:
        """The value of rank 0."""
        key = next(self._keys)
        if self._here.rank != 0:
            return self._hear(key)
        self._store.set(key, value)
        return value

    def _hear(self, key: str) -> str:
        """Does not return if a rank found a mistake meanwhile: then all end, as at the start."""
        import torch.distributed as dist

        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                self._store.wait([key], _LOOK)
                return self._store.get(key).decode()
            except dist.DistError:
                if self._store.add(launch._MISTAKES, 0):
                    launch._arrive(self._store, "start", self._here, MEETING_TIMEOUT)
                    launch._leave(self._store, self._here, MEETING_TIMEOUT)
                if time.monotonic() > deadline:
                    raise
