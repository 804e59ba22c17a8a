"""One rank reads, all ranks of the tensor-parallel group get it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moe.data.batch import Batch, fetch_step
from tests.support.pool import Pool, RemoteError

CPU = torch.device("cpu")


def batches(count: int, seed: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, 256384, (2, 9), generator=generator)
        mask = torch.rand((2, 8), generator=generator)
        yield Batch(tokens_BS=ids[:, :-1], labels_BS=ids[:, 1:], loss_mask_BS=mask)


def with_documents(count: int, seed: int = 0) -> Iterator[Batch]:
    for batch in batches(count, seed):
        ids = batch.tokens_BS % 7
        yield replace(batch, positions_BS=ids, documents_BS=ids.cumsum(1))


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in vars(one)]
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    pairs = [(a, b) for a, b in pairs if a is not None]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def fetch_twice(rank: int, world_size: int) -> list[bool]:
    """Two groups of two, each with its own data; what every rank got against what was read."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = rank // 2
    iterator = batches(6, seed=mine) if rank % 2 == 0 else None
    got = [b for _ in range(2) for b in fetch_step(iterator, 3, groups[mine], (2, 8), CPU)]
    return [equal(a, b) for a, b in zip(got, batches(6, seed=mine), strict=True)]


def test_every_rank_gets_what_the_first_read(pool: Pool) -> None:
    assert pool.run(fetch_twice, 4) == [[True] * 6] * 4


def fetch_documents(rank: int, world_size: int) -> list[bool]:
    iterator = with_documents(4) if rank == 0 else None
    names, group = ("positions", "documents"), dist.group.WORLD
    got = fetch_step(iterator, 2, group, (2, 8), CPU, names)
    part = fetch_step(iterator, 2, group, (2, 8), CPU, names[1:])
    read = list(with_documents(4))
    read[2:] = [replace(batch, positions_BS=None) for batch in read[2:]]
    return [equal(a, b) for a, b in zip([*got, *part], read, strict=True)]


def test_documents_come_along(pool: Pool) -> None:
    assert pool.run(fetch_documents, 2) == [[True] * 4] * 2


def fetch_too_much(rank: int, world_size: int) -> Any:
    iterator = batches(2) if rank == 0 else None
    return fetch_step(iterator, 3, dist.group.WORLD, (2, 8), CPU)


def test_the_end_of_the_data_is_an_error_not_a_wait(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="data ended at micro-batch 2 of 3"):
        pool.run(fetch_too_much, 2)


def test_without_a_group() -> None:
    got = fetch_step(batches(3), 3, None, (2, 8), CPU)
    assert all(equal(a, b) for a, b in zip(got, batches(3), strict=True))


def test_wrong_shape_and_no_reader() -> None:
    with pytest.raises(RuntimeError, match=r"must be \(2, 16\) \(got \(2, 8\)\)"):
        fetch_step(batches(1), 1, None, (2, 16), CPU)
    with pytest.raises(ValueError, match="needs an iterator"):
        fetch_step(None, 1, None, (2, 8), CPU)
