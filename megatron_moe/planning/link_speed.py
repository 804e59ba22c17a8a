"""Measured on the ranks: bandwidth of collectives, arithmetic of a GPU, clocks, shared files.

Everything is called by all ranks together. A bandwidth is what each rank sends over the time that
the slowest rank takes, as `placement` counts it, so that it is comparable with the planner's.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.placement import GroupPlace, seconds_of, sent_bytes
from megatron_moe.planning.traffic import Transfer

Measured = Literal["all-reduce", "all-to-all"]
_WARM_UP, _REPEATS = 2, 5
_PINGS = 5
_SEEN_WITHIN = 10.0
"""Seconds in which a file must be visible on other nodes: NFS caches attributes for some."""


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """One collective, measured."""

    backend: str
    operation: Measured
    place: GroupPlace
    bytes: int
    """Of the whole tensor of a rank."""
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes that a rank sends in a second."""
        return self._sent / self.seconds / 1e9

    def assumed(self, cluster: Cluster) -> float:
        """The same as the planner predicts it, latency included."""
        transfer = Transfer(self.operation, "dp", self.bytes)
        return self._sent / seconds_of(transfer, self.place, cluster) / 1e9

    @property
    def _sent(self) -> float:
        links = sent_bytes(Transfer(self.operation, "dp", self.bytes), self.place)
        return links.intra + links.inter

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "gigabytes_per_second": self.gigabytes_per_second}


def link_speed(
    backend: str,
    operation: Measured,
    group: dist.ProcessGroup,
    per_node: int,
    megabytes: int,
    device: torch.device,
) -> LinkSpeed:
    """Measure a collective over a group.

    Args:
        backend: `nccl` or `gloo`, that of the group.
        operation: which collective.
        group: of this rank.
        per_node: ranks of the group on a node.
        megabytes: size of the tensor of a rank, 10^6 bytes.
        device: of the tensor.
    """
    size = dist.get_world_size(group)
    count = megabytes * 1_000_000 // 4 // size * size
    tensor = torch.ones(count, dtype=torch.float32, device=device)
    received = torch.empty_like(tensor)

    def run() -> None:
        if operation == "all-to-all":
            dist.all_to_all_single(received, tensor, group=group)
        else:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)

    for _ in range(_WARM_UP):
        run()
    seconds = torch.tensor(
        statistics.median(_seconds(run, group, device) for _ in range(_REPEATS)),
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    return LinkSpeed(
        backend=backend,
        operation=operation,
        place=GroupPlace(size, 1, min(per_node, size)),
        bytes=tensor.nbytes,
        seconds=float(seconds),
    )


def _seconds(run: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    dist.barrier(group)
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_offset(ranks: RankGroup, leaders: list[int]) -> float:
    """Seconds by which the clock of this rank's node is ahead of rank 0's.

    Rank 0 answers each leader in turn with its time; half of the quickest round trip is the error.

    Args:
        ranks: all ranks, over gloo.
        leaders: the first rank of each node, rank 0 first. The offset of other ranks is 0.
    """
    offset = 0.0
    for leader in leaders[1:]:
        for _ in range(_PINGS):
            if ranks.rank == 0:
                _answer(leader, ranks.group)
        if ranks.rank == leader:
            offset = min(_asked(ranks.group) for _ in range(_PINGS))[1]
    return offset


def _answer(leader: int, group: dist.ProcessGroup | None) -> None:
    dist.recv(torch.empty(1, dtype=torch.float64), src=leader, group=group)
    dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=leader, group=group)


def _asked(group: dist.ProcessGroup | None) -> tuple[float, float]:
    """Round trip and offset of one question."""
    answer = torch.empty(1, dtype=torch.float64)
    start = time.time()
    dist.send(answer, dst=0, group=group)
    dist.recv(answer, src=0, group=group)
    end = time.time()
    return end - start, (start + end) / 2 - float(answer)


def shared_directory_error(directory: Path, ranks: RankGroup, token: str) -> str:
    """What is wrong with a directory on this rank; empty if nothing.

    Every rank writes a file; every rank reads that of rank 0, and rank 0 those of all. Nothing
    stays.

    Args:
        directory: created if it is missing, then removed again.
        ranks: all ranks.
        token: the same on all ranks, different in each check.
    """
    # Asked before any rank creates it.
    created = ranks.all_reduce_sum(not directory.exists())[0] == ranks.size
    mine = _probe(directory, token, ranks.rank)
    error = ""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with mine.open("x") as file:
            file.write(str(ranks.rank))
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        error = f"cannot write: {failure.strerror}"
    ranks.all_reduce_sum(0)
    expected = range(ranks.size) if ranks.rank == 0 else range(1)
    unseen = [other for other in expected if not _seen(_probe(directory, token, other), other)]
    if not error and unseen:
        error = f"does not see what rank {unseen[0]} wrote"
    ranks.all_reduce_sum(0)
    with contextlib.suppress(OSError):
        mine.unlink()
    ranks.all_reduce_sum(0)
    if created and ranks.rank == 0:
        with contextlib.suppress(OSError):
            directory.rmdir()
    return error


def _probe(directory: Path, token: str, rank: int) -> Path:
    return directory / f".check-{token}-{rank}"


def _seen(path: Path, rank: int) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == str(rank):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
