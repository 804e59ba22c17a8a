"""Which kernels the ranks take, known before there are process groups."""

from __future__ import annotations

import socket
from collections import defaultdict

from megatron_moe.config import RunConfig
from megatron_moe.moe.registry import kernels_for
from megatron_moe.parallel.collectives import RankGroup


def unequal_kernels(config: RunConfig, device_type: str, ranks: RankGroup) -> list[str]:
    """Choose them, compile what is compiled at first use, and say where ranks differ.

    The log says what the first rank took. Each rank chooses for itself: one whose node has no
    compiler takes other kernels than the rest.

    Returns:
        On rank 0, a line for each choice, if there are several; nothing on the others.

    Raises:
        UsageError: what `--moe-dispatch-impl` names is not available here; it says why.
    """
    chosen = kernels_for(config.moe, device_type).selected
    took = sorted({f"{kernel.implementation} ({kernel.reason})" for kernel in chosen})
    told = ranks.gather([", ".join(took), socket.gethostname()])
    hosts_by_choice: dict[str, list[str]] = defaultdict(list)
    for choice, host in told or []:
        hosts_by_choice[choice].append(host)
    if len(hosts_by_choice) == 1:
        return []
    return [
        f"MoE kernels of {len(hosts)} of {ranks.size} ranks: {choice}; on {_few(hosts)}"
        for choice, hosts in hosts_by_choice.items()
    ]


def _few(hosts: list[str], most: int = 4) -> str:
    """Each once, and of many the first."""
    names = list(dict.fromkeys(hosts))
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
