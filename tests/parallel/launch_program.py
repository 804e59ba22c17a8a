"""A program for `test_launch.py` to start under torchrun; its argument chooses what goes wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from megatron_moe.errors import UsageError
from megatron_moe.parallel import launch
from megatron_moe.parallel.launch import launched, run_or_exit

if TYPE_CHECKING:
    import torch.distributed as dist

Answer = TypeVar("Answer")


def main() -> None:
    what, rank = sys.argv[1], launched().rank
    if what == f"once, rank {rank} lingers":
        linger()
    if what == "everywhere" or (what.startswith("once") and rank == 1):
        raise UsageError("--planted", 3, "1 or 2")
    if what == "each its own":
        raise UsageError("--planted", rank, "something else")

    import torch

    from tests.support import toy

    ctx = toy.context(launched().world_size)
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=ctx.pgs.dp)
    # One write each: lines of ranks that share a pipe stay lines.
    os.write(1, f"sum {int(total)}\n".encode())
    if what == "late":
        raise UsageError("--planted", 3, "unset once groups exist")


class SlowStore:
    """A store whose requests are a second late; prints a line if it is not served any more."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self.wait = store.wait

    def add(self, key: str, amount: int) -> int:
        return self._late(lambda: self.store.add(key, amount), 0)

    def set(self, key: str, value: str) -> None:
        self._late(lambda: self.store.set(key, value), None)

    def _late(self, call: Callable[[], Answer], otherwise: Answer) -> Answer:
        import torch.distributed as dist

        time.sleep(1)
        try:
            return call()
        except dist.DistError:
            print("the store is gone", file=sys.stderr)
            return otherwise


def linger() -> None:
    """Be slow to exit after the startup barrier."""
    exit_now = launch.exit_together

    def later(store: dist.Store, here: launch.Launched, timeout: timedelta) -> NoReturn:
        time.sleep(1)
        exit_now(cast("dist.Store", SlowStore(store)), here, timeout)

    launch.exit_together = later


if __name__ == "__main__":
    run_or_exit(main, prog="program")
