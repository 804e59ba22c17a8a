"""A program for `test_launch.py` to start under torchrun; its argument says what goes wrong."""

from __future__ import annotations

import sys

from megatron_moe.errors import UsageError
from megatron_moe.parallel.launch import launched, run_or_exit


def main() -> None:
    what, rank = sys.argv[1], launched().rank
    if what == "everywhere" or (what == "once" and rank == 1):
        raise UsageError("--planted", 3, "1 or 2")
    if what == "each its own":
        raise UsageError("--planted", rank, "something else")

    import torch

    from tests.support import toy

    ctx = toy.context(launched().world_size)
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=ctx.pgs.dp)
    print(f"sum {int(total)}")
    if what == "late":
        raise UsageError("--planted", 3, "nothing after the groups exist")


if __name__ == "__main__":
    run_or_exit(main, prog="program")
