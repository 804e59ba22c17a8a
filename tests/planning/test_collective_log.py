"""Orders of collectives that fit and that do not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megatron_moe.planning.collective_log import Collective, mismatches

TP, PP = (0, 1), (0, 2)


def reduce(size: int = 8, group: tuple[int, ...] = TP) -> Collective:
    return Collective("all-reduce", group, size, "float32")


def gather(size: int = 8) -> Collective:
    return Collective("all-gather", TP, size, "float32")


def send(peer: int, size: int = 4) -> Collective:
    return Collective("send", PP, size, "bfloat16", peer)


def receive(peer: int, size: int = 4) -> Collective:
    return Collective("receive", PP, size, "bfloat16", peer)


def test_equal_orders_fit_whatever_other_groups_do_between():
    logs = {
        0: [reduce(), send(2), gather(), receive(2, 6)],
        1: [reduce(), gather()],
        2: [send(0, 6), reduce(4, (2, 3)), receive(0)],
    }
    assert mismatches(logs) == []


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ([gather(), reduce()], "call 1 .* rank 0 has all-reduce of 8 .* rank 1 has all-gather"),
        ([reduce(), gather(16)], "call 2 .* all-gather of 8 bytes .* all-gather of 16 bytes"),
        ([reduce(), replace(gather(), dtype="bfloat16")], "call 2 .* float32, .* bfloat16"),
        ([reduce()], "call 2 .* rank 1 has no further call"),
        ([reduce(), gather(), gather()], "call 3 .* rank 0 has no further call"),
    ],
)
def test_another_order_size_or_number_is_found(theirs, says):
    (line,) = mismatches({0: [reduce(), gather()], 1: theirs})
    assert re.search(says, line), line


def test_groups_that_alternate_in_another_order_are_found():
    """Each group has its one call on both ranks; each rank waits for the other in another one."""
    both = (0, 1, 2, 3)
    logs = {0: [reduce(), reduce(4, both)], 1: [reduce(4, both), reduce()]}
    (line,) = mismatches(logs)
    assert re.search(
        "call 1 in the groups of ranks 0 and 1: rank 0 has all-reduce of 8 .* of ranks 0, 1,", line
    )
    assert mismatches({0: logs[0], 1: logs[0]}) == []
    # A rank of another group only sees the one group that they share.
    assert mismatches({0: logs[0], 2: [reduce(4, both)]}) == []


@pytest.mark.parametrize(
    "theirs", [[receive(0, 6), send(0)], [receive(0)], [receive(0), receive(0), send(0)]]
)
def test_what_is_sent_must_be_received(theirs):
    assert mismatches({0: [send(2), receive(2)], 2: [receive(0), send(0)]}) == []
    assert mismatches({0: [send(2), receive(2)], 2: theirs})


def test_broadcasts_come_from_one_root():
    from_0, from_1 = (Collective("broadcast", TP, 4, "int32", root=r) for r in TP)
    assert mismatches({0: [from_0], 1: [from_0]}) == []
    assert len(mismatches({0: [from_0], 1: [from_1]})) == 1
