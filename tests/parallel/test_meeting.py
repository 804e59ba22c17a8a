"""Ranks that talk before there are process groups: a store that rank 0 serves, real processes."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest

from megatron_moe.errors import Corrupt, UsageError
from megatron_moe.parallel.collectives import launch_rank_group
from megatron_moe.parallel.launch import launched, run_or_exit
from megatron_moe.parallel.meeting import Rendezvous
from tests.faults.killing import start_fork


def _ranks(body: Callable[[int, Rendezvous], None], size: int = 3) -> list[int]:
    """Exit codes of the ranks of a launch without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                run_or_exit(lambda: body(rank, Rendezvous(launched(), timedelta(seconds=60))))
        except SystemExit as exit_:
            os._exit(int(exit_.code or 0))

    children = [start_fork(partial(child, rank)) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_values_are_gathered_and_broadcast():
    def body(rank: int, meeting: Rendezvous) -> None:
        for turn in ("first", "second"):
            told = meeting.gather(f"{turn} of {rank}")
            expected = [f"{turn} of {each}" for each in range(3)]
            assert told == (expected if rank == 0 else None)
            assert meeting.broadcast(f"{turn} {rank}") == f"{turn} 0"
        meeting.gather("done")  # rank 0 serves the store until all have heard

    assert _ranks(body) == [0, 0, 0]


@pytest.mark.parametrize("mistaken", [0, 2])
def test_a_rank_with_a_mistake_of_its_own_ends_those_that_wait_for_it(mistaken):
    def body(rank: int, meeting: Rendezvous) -> None:
        if rank == mistaken:
            raise UsageError("--planted", rank, "nothing")
        meeting.gather("x")
        meeting.broadcast("y")

    assert _ranks(body) == [2, 2, 2]


def test_what_one_rank_finds_wrong_is_wrong_for_all():
    """As ranks of a checkpoint: the same error everywhere, said once by the launch."""

    def body(rank: int, _: Rendezvous) -> None:
        ranks = launch_rank_group(launched(), timedelta(seconds=60))
        assert ranks.broadcast(["told", rank]) == ["told", 0]
        assert ranks.gather(rank) == ([0, 1, 2] if rank == 0 else None)

        def read() -> None:
            if rank == 0:
                raise Corrupt("file", "damaged", "whole")

        with pytest.raises(Corrupt, match="file is 'damaged'"):
            ranks.together(read)
        ranks.together(read)

    assert _ranks(body) == [2, 2, 2]
