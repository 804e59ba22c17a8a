"""Every collective of one rank in order, and whether the orders of two ranks fit.

Two ranks of a group that call its collectives in another order, with another size or of another
kind, wait for each other until the timeout. `mismatches` finds the first such call in the logs of
two ranks, which need not have run at the same time or on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
}
"""PyTorch's operators in the words of the report."""
_WRITES_FIRST = ("all-gather", "reduce-scatter", "all-to-all")
"""Collectives whose first argument is an output of its own."""


@dataclass(frozen=True)
class Collective:
    """One call."""

    operation: str
    """`all-reduce`, `send`, ..."""
    group: tuple[int, ...]
    """Global ranks."""
    size: int
    """Bytes of the whole: what an all-gather returns, a reduce-scatter takes, others move."""
    dtype: str
    peer: int | None = None
    """Global rank to which `send` sends, or from which `receive` receives."""
    root: int | None = None
    """Global rank from which `broadcast` comes."""

    def __str__(self) -> str:
        other = "".join(f" rank {r}" for r in (self.peer, self.root) if r is not None)
        return f"{self.operation}{other} of {self.size:,} bytes {self.dtype}"


class CollectiveLog(TorchDispatchMode):
    """Lists this thread's collectives while it is entered, as a context manager.

    Attributes:
        calls: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; list it if it is a collective."""
        if func.namespace == "c10d":
            call = _collective(func, args)
            if len(call.group) > 1:
                self.calls.append(call)
                self.written(call, args)
        return func(*args, **(kwargs or {}))

    def written(self, call: Collective, args: tuple[Any, ...]) -> None:
        """Called for each collective with its arguments; derived classes override it."""

    @staticmethod
    def outputs(call: Collective, args: tuple[Any, ...]) -> list[Tensor]:
        """Tensors that a call writes and does not read."""
        if call.operation in _WRITES_FIRST or call.operation == "receive":
            return [leaf for leaf in pytree.tree_leaves(args[0]) if isinstance(leaf, Tensor)]
        return []


def _collective(func: Any, args: tuple[Any, ...]) -> Collective:
    name = func._schema.name.split("::")[1]
    operation = _NAMES.get(name, name)
    group = next(_unboxed(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    ranks = tuple(dist.get_process_group_ranks(group))
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    sides: list[int] = []
    for arg in args:
        leaves = [leaf for leaf in pytree.tree_leaves(arg) if isinstance(leaf, Tensor)]
        if leaves:
            sides.append(sum(leaf.numel() * leaf.element_size() for leaf in leaves))
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    call = Collective(operation, ranks, max(sides, default=0), dtype)
    if name in ("send", "recv_"):
        return replace(call, peer=ranks[int(args[2])])
    return replace(call, root=ranks[int(args[2])]) if name == "broadcast_" else call


def _unboxed(group: Any) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(group)  # type: ignore[attr-defined, no-any-return]


def mismatches(logs: Mapping[int, Sequence[Collective]]) -> list[str]:
    """What would not fit if these ranks ran together.

    A line for each group and pair of ranks; or one for a pair whose groups fit each by itself, but
    whose calls alternate between them in another way: with one GPU for the kernels of all groups,
    each rank may wait for what the other one has not started.

    Args:
        logs: calls of some ranks, by global rank.
    """
    found = []
    ranks = sorted(logs)
    for index, first in enumerate(ranks):
        for second in ranks[index + 1 :]:
            found += list(_mismatches_of_pair(first, second, logs))
    return found


def _mismatches_of_pair(
    first: int, second: int, logs: Mapping[int, Sequence[Collective]]
) -> Iterator[str]:
    every = {c.group for rank in (first, second) for c in logs[rank]}
    shared = sorted(g for g in every if first in g and second in g)
    found = [line for g in shared for line in _mismatches_of_group(first, second, g, logs)]
    yield from found or _other_order_of_groups(first, second, set(shared), logs)


def _mismatches_of_group(
    first: int, second: int, group: tuple[int, ...], logs: Mapping[int, Sequence[Collective]]
) -> Iterator[str]:
    ours, theirs = ([c for c in logs[r] if c.group == group] for r in (first, second))
    together = [[c for c in calls if c.peer is None] for calls in (ours, theirs)]
    yield from _first_difference(first, second, group, *together)
    yield from _first_difference(
        first, second, group, _to(ours, "send", second), _to(theirs, "receive", first)
    )
    yield from _first_difference(
        first, second, group, _to(ours, "receive", second), _to(theirs, "send", first)
    )


def _other_order_of_groups(
    first: int,
    second: int,
    shared: set[tuple[int, ...]],
    logs: Mapping[int, Sequence[Collective]],
) -> Iterator[str]:
    """The first call after which two ranks go on in different groups.

    What is sent and received is left out: stages take it in turns, each in its own order.
    """
    ours, theirs = (
        [c for c in logs[r] if c.group in shared and c.peer is None] for r in (first, second)
    )
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if a.group != b.group:
            yield (
                f"call {number} in the groups of ranks {first} and {second}: rank {first} has {a}"
                f" in the group of ranks {_abbreviated(a.group)}, rank {second} has {b} in that of"
                f" {_abbreviated(b.group)}"
            )
            return


def _to(calls: Sequence[Collective], operation: str, peer: int) -> list[Collective]:
    return [c for c in calls if c.operation == operation and c.peer == peer]


def _first_difference(
    first: int,
    second: int,
    group: tuple[int, ...],
    ours: Sequence[Collective],
    theirs: Sequence[Collective],
) -> Iterator[str]:
    for number in range(max(len(ours), len(theirs))):
        a = ours[number] if number < len(ours) else None
        b = theirs[number] if number < len(theirs) else None
        if a is None or b is None or not _fits(a, b):
            yield (
                f"call {number + 1} in the group of ranks {_abbreviated(group)}: rank {first} has "
                f"{a or 'no further call'}, rank {second} has {b or 'no further call'}"
            )
            return


def _fits(a: Collective, b: Collective) -> bool:
    if a.peer is None:
        return a == b
    return (a.size, a.dtype) == (b.size, b.dtype)


def _abbreviated(group: tuple[int, ...], most: int = 4) -> str:
    names = ", ".join(map(str, group[:most]))
    return names if len(group) <= most else f"{names}, ... ({len(group)})"
