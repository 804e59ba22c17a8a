"""The pool itself: results by rank, a fresh group per call, and failures that do not stick."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.pool import Pool, RemoteError


def summed(rank: int, world_size: int, *, scale: float) -> tuple[int, torch.Tensor]:
    assert dist.get_world_size() == world_size and dist.get_rank() == rank
    total = torch.tensor([scale * (rank + 1)])
    dist.all_reduce(total)
    return os.getpid(), total


def fails_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()


def hangs_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def dies_on_one(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def drawn(rank: int, world_size: int) -> float:
    return float(torch.rand(()))


def test_results_come_in_rank_order_from_persistent_processes(pool: Pool) -> None:
    first = pool.run(summed, 2, scale=1.0)
    second = pool.run(summed, 2, scale=2.0)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first} | {os.getpid()}) == 3
    assert [float(total) for _, total in first] == [3.0, 3.0]
    assert [float(total) for _, total in second] == [6.0, 6.0]


def test_worlds_of_other_sizes_follow_each_other(pool: Pool) -> None:
    assert [float(total) for _, total in pool.run(summed, 1, scale=1.0)] == [1.0]
    assert [float(total) for _, total in pool.run(summed, 3, scale=1.0)] == [6.0] * 3


def test_every_call_starts_from_the_same_seed(pool: Pool) -> None:
    assert pool.run(drawn, 2) == pool.run(drawn, 2)


def test_a_failure_names_the_first_rank_and_leaves_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="ValueError: planted") as caught:
        pool.run(fails_on_one, 2)
    assert (caught.value.rank, caught.value.kind) == (1, "ValueError")
    assert [float(total) for _, total in pool.run(summed, 2, scale=1.0)] == [3.0, 3.0]


def test_a_hang_ends_in_a_failure_that_shows_where(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="hangs_on_one"):
        pool.run(hangs_on_one, 2, timeout=2)
    assert [float(total) for _, total in pool.run(summed, 2, scale=1.0)] == [3.0, 3.0]


def test_a_dead_rank_is_replaced(pool: Pool) -> None:
    with pytest.raises(RemoteError):
        pool.run(dies_on_one, 2, timeout=20)
    assert [float(total) for _, total in pool.run(summed, 2, scale=1.0)] == [3.0, 3.0]


def test_functions_that_no_other_process_can_import_are_rejected(pool: Pool) -> None:
    with pytest.raises(ValueError, match="top-level"):
        pool.run(lambda rank, world_size: None, 1)
