"""Which ranks are on one node, and what a collective sends over each kind of link.

Megatron-Core numbers ranks with tensor parallelism innermost and pipeline stages outermost
(`tp-cp-ep-dp-pp`); the experts' grid is expert tensor, expert, expert data, pipeline. Launchers
number the GPUs of a node consecutively. With TP 2, EP 4 and ETP 1 on nodes of 8, tensor-parallel
groups are neighbours, expert-parallel ones ranks 0 to 3 and 4 to 7, and both stay inside nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.traffic import GroupName, Transfer


@dataclass(frozen=True)
class GroupPlace:
    """Where the ranks of a group are."""

    size: int
    stride: int
    """Between the numbers of neighbours."""
    per_node: int
    """Members on one node."""

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return -(-self.size // self.per_node)


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that one rank sends over each kind of link."""

    intra: float
    inter: float


def place_of(layout: Layout, cluster: Cluster, group: GroupName) -> GroupPlace:
    """Where a group of the layout lies on the cluster."""
    size, stride = size_and_stride(layout, group)
    per_node = max(1, min(size, cluster.gpus_per_node // max(stride, 1)))
    return GroupPlace(size, stride, per_node)


def size_and_stride(layout: Layout, group: GroupName) -> tuple[int, int]:
    """Ranks of a group, and the difference between the numbers of neighbours."""
    return {
        "tp": (layout.tp, 1),
        "dp": (layout.dp, layout.tp),
        "etp": (layout.etp, 1),
        "ep": (layout.ep, layout.etp),
        "edp": (layout.edp, layout.etp * layout.ep),
        "pp": (layout.pp, layout.world_size // layout.pp),
        "embedding": (2, layout.world_size // layout.pp * (layout.pp - 1)),
    }[group]


def sent_bytes(transfer: Transfer, place: GroupPlace) -> LinkBytes:
    """What one rank sends for a collective.

    Rings: an all-gather or reduce-scatter of N bytes over n ranks sends (n - 1) / n N from each
    rank to the next, an all-reduce twice that; NCCL lets every member of a node be the one that
    sends to the next node for its share. All-to-all: N / n to every other rank.
    """
    n, here = place.size, place.per_node
    if n == 1:
        return LinkBytes(0.0, 0.0)
    if transfer.operation == "send":
        inside = here > 1
        return LinkBytes(transfer.bytes * inside, transfer.bytes * (not inside))
    if transfer.operation == "all-to-all":
        return LinkBytes(transfer.bytes * (here - 1) / n, transfer.bytes * (n - here) / n)
    ring = transfer.bytes * (n - 1) / n * (2 if transfer.operation == "all-reduce" else 1)
    if place.nodes == 1:
        return LinkBytes(ring, 0.0)
    return LinkBytes(ring * (here - 1) / here, ring / here)


def seconds_of(transfer: Transfer, place: GroupPlace, cluster: Cluster) -> float:
    """Time of a collective that nothing else disturbs."""
    if place.size == 1 or not transfer.bytes:
        return 0.0
    sent = sent_bytes(transfer, place)
    if transfer.operation not in ("send", "all-to-all") and place.nodes > 1:
        # The whole ring passes through every GPU of a node, and 1 / m of it through each card.
        sent = LinkBytes(sent.intra + sent.inter if place.per_node > 1 else 0.0, sent.inter)
    moving = max(sent.intra / cluster.intra_bandwidth, sent.inter / cluster.inter_bandwidth) / 1e9
    latency = cluster.intra_microseconds if place.per_node > 1 else 0.0
    if sent.inter:
        nodes = 2 if transfer.operation == "send" else place.nodes
        latency += cluster.inter_microseconds * math.log2(nodes)
    return moving + latency / 1e6
