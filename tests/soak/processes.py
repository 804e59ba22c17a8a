"""The processes of one start, found by a mark in their environment, whoever their parent is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MARK = "MEGATRON_MOE_SOAK"
"""Environment variable whose value names the start; children inherit it."""
PROGRAM = "pretrain_openmoe.py"
Role = Literal["launcher", "rank", "worker", "other"]


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a start."""

    pid: int
    role: Role
    state: str
    """As in /proc: R, S, D, T (stopped), Z (ended, not yet waited for)."""

    @property
    def memory(self) -> int:
        """Anonymous resident memory in bytes; 0 once it has ended."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) << 10
        return 0

    @property
    def descriptors(self) -> int:
        """Open files, sockets and pipes."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return 0


def processes(mark: str) -> list[Process]:
    """The live processes of the start ``mark``.

    The launcher is the one without `RANK`; a rank is its child that runs the training program; a
    worker is a child of a rank that is a fork of it, so that it has the same command line.
    """
    parents: dict[int, int] = {}
    found: dict[int, tuple[str, str, bool]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError, IndexError):
            values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() not in values:
                continue
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            has_rank = any(value.startswith(b"RANK=") for value in values)
            parents[pid], found[pid] = int(parent), (state, command, has_rank)
    in_program = {pid for pid, (_, command, _) in found.items() if PROGRAM in command}
    with_rank = {pid for pid, (_, _, has_rank) in found.items() if has_rank}
    ranks = {pid for pid in in_program & with_rank if parents[pid] not in with_rank}
    return [
        Process(pid=pid, state=state, role=_role(pid, parents[pid], ranks, has_rank, command))
        for pid, (state, command, has_rank) in sorted(found.items())
        if state != "Z"
    ]


def _role(pid: int, parent: int, ranks: set[int], has_rank: bool, command: str) -> Role:
    if pid in ranks:
        return "rank"
    if parent in ranks and PROGRAM in command:
        return "worker"
    return "launcher" if not has_rank and "torch.distributed.run" in command else "other"


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def end_all(mark: str, patience: float) -> int:
    """Wait until every process of a start has ended; kill those that stay, and count them."""
    begin = time.monotonic()
    while left := processes(mark):
        if time.monotonic() - begin > patience:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
            return len(left)
        time.sleep(0.1)
    return 0
