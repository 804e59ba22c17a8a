"""Whether the kernels asked for are there, known before there are process groups."""

from __future__ import annotations

import socket
import sys

from megatron_moe.config import RunConfig
from megatron_moe.moe.kernels import kernels_of
from megatron_moe.parallel.launch import Launched


def check_kernels(config: RunConfig, device_type: str, here: Launched) -> None:
    """Choose them, and compile what is compiled at first use.

    The log says what the first rank took. A node that lacks what `auto` would have taken says so
    itself, on standard error.

    Raises:
        UsageError: what `--moe-dispatch-impl` names is not available here; it says why.
    """
    missing = {k.missing for k in kernels_of(config.moe.moe_dispatch_impl, device_type).values()}
    if here.rank and here.local_rank == 0:
        for why_not in sorted(missing - {""}):
            line = f"rank {here.rank} on {socket.gethostname()}: MoE kernels: {why_not}"
            print(line, file=sys.stderr, flush=True)
