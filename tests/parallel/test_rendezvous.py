"""Communication before there are process groups: real processes, a store that rank 0 serves."""

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
from megatron_moe.parallel.launch import Rendezvous, launched, run_or_exit
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
    def body(rank: int, rendezvous: Rendezvous) -> None:
        for turn in ("first", "second"):
            gathered = rendezvous.gather(f"{turn} of {rank}")
            expected = [f"{turn} of {each}" for each in range(3)]
            assert gathered == (expected if rank == 0 else None)
            assert rendezvous.broadcast(f"{turn} {rank}") == f"{turn} 0"
        rendezvous.gather("done")  # rank 0 serves the store until all have received

    assert _ranks(body) == [0, 0, 0]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_with_a_usage_error_ends_those_that_wait_for_it(failing):
    def body(rank: int, rendezvous: Rendezvous) -> None:
        if rank == failing:
            raise UsageError("--planted", rank, "nothing")
        rendezvous.gather("x")
        rendezvous.broadcast("y")

    assert _ranks(body) == [2, 2, 2]


def test_an_error_of_one_rank_is_raised_on_all():
    """As the ranks that read a checkpoint: the same error on all, printed once by the launch."""

    def body(rank: int, _: Rendezvous) -> None:
        ranks = launch_rank_group(launched(), timedelta(seconds=60))
        assert ranks.broadcast(["value", rank]) == ["value", 0]
        assert ranks.gather(rank) == ([0, 1, 2] if rank == 0 else None)

        def read() -> None:
            if rank == 0:
                raise Corrupt("file", "damaged", "whole")

        with pytest.raises(Corrupt, match=r"file must be whole \(got 'damaged'\)"):
            ranks.run_on_all(read)
        ranks.run_on_all(read)

    assert _ranks(body) == [2, 2, 2]
