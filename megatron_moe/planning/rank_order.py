"""Which ranks form which groups, and a picture of them on the nodes.

The order is Megatron-Core's: `placement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_moe.parallel.layout import Layout
from megatron_moe.parallel.waiting import ranks_text
from megatron_moe.planning.placement import size_and_stride
from megatron_moe.planning.traffic import GroupName

NAMES: Mapping[GroupName, str] = {
    "tp": "tensor",
    "dp": "data",
    "etp": "expert tensor",
    "ep": "expert",
    "edp": "expert data",
    "pp": "pipeline",
}
_INSIDE: tuple[GroupName, ...] = ("tp", "etp", "ep")
"""Groups whose collectives a step waits for, in every layer."""


def groups_of(layout: Layout, group: GroupName) -> list[list[int]]:
    """Every group of a kind, the ranks of each in their order."""
    size, stride = size_and_stride(layout, group)
    span = size * stride
    return [
        [first + offset + member * stride for member in range(size)]
        for first in range(0, layout.world_size, span)
        for offset in range(stride)
    ]


def broken_groups(
    layout: Layout, hosts: Sequence[str], group: GroupName
) -> list[tuple[list[int], int]]:
    """Groups that are on more nodes than they must be, and on how many.

    Tensor-parallel groups belong inside a node; expert-parallel ones where a node has as many ranks
    as they have, else on as few nodes as hold them.

    Args:
        layout: of the run.
        hosts: name of the node of each rank.
        group: which kind.
    """
    per_node = max(map(hosts.count, set(hosts)))
    found = []
    for ranks in groups_of(layout, group):
        nodes = len({hosts[rank] for rank in ranks})
        fewest = 1 if group in ("tp", "etp") else -(-len(ranks) // per_node)
        if nodes > fewest:
            found.append((ranks, nodes))
    return found


def picture(layout: Layout, per_node: int, most: int = 8) -> Iterator[str]:
    """The ranks of each node, tensor and expert groups in brackets, and what spans nodes.

    Args:
        layout: of the run.
        per_node: ranks of a node.
        most: nodes to draw; the others are counted.
    """
    yield f"{layout.world_size} ranks, {per_node} a node; ranks in brackets form a group"
    nodes = -(-layout.world_size // per_node)
    shown = [group for group in _INSIDE if group != "etp" or layout.etp > 1]
    for node in range(min(nodes, most)):
        ranks = range(node * per_node, min((node + 1) * per_node, layout.world_size))
        stages = sorted({rank * layout.pp // layout.world_size for rank in ranks})
        where = " and ".join(f"stage {stage}" for stage in stages)
        yield f"node {node}: {ranks_text(ranks)}, pipeline {where}"
        for group in shown:
            yield f"  {NAMES[group]:<14}{_brackets(layout, group, ranks)}"
    if nodes > most:
        yield f"... and {nodes - most} more nodes"
    yield "groups"
    hosts = [str(rank // per_node) for rank in range(layout.world_size)]
    for group, name in NAMES.items():
        groups = groups_of(layout, group)
        first = groups[0]
        spread = max(len({hosts[rank] for rank in ranks}) for ranks in groups)
        if len(first) > 1:
            place = "inside a node" if spread == 1 else f"over {spread} nodes"
            stride = first[1] - first[0]
            step = f" with a stride of {stride}" if stride > 1 else ""
            yield f"  {name:<14}{len(first)} ranks{step}, {place}"
    for group in _INSIDE:
        if broken := broken_groups(layout, hosts, group):
            ranks_, count = broken[0]
            yield f"  the {NAMES[group]} group of {ranks_text(ranks_)} is on {count} nodes"


def _brackets(layout: Layout, group: GroupName, ranks: range) -> str:
    """The parts of groups that are among these ranks."""
    parts = []
    for members in groups_of(layout, group):
        here = [rank for rank in members if rank in ranks]
        if here:
            cut = "" if len(here) == len(members) else " .."
            parts.append(f"[{' '.join(map(str, here))}{cut}]")
    return " ".join(parts)
