"""Every collective that Megatron-Core and this project use, on gloo, in every type they use.

Integers small enough that bfloat16 holds every sum exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from tests.support.pool import Pool

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
WIDTH = 4


class Check:
    """Collectives of one rank in one type, each against what it must give."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype
        self.total = size * (size + 1) // 2

    def full(self, value: float, width: int = WIDTH) -> Tensor:
        return torch.full((width,), value, dtype=self.dtype)

    def mine(self, parts: int = 1) -> Tensor:
        return self.full(self.rank + 1, WIDTH * parts)

    def everyone(self, width: int = WIDTH) -> Tensor:
        return torch.arange(1, self.size + 1).repeat_interleave(width).to(self.dtype)

    def all_reduce(self) -> bool:
        x, y = self.mine(), self.mine()
        dist.all_reduce(x)
        dist.all_reduce(y, op=dist.ReduceOp.MAX)
        return torch.equal(x, self.full(self.total)) and torch.equal(y, self.full(self.size))

    def all_reduce_average(self) -> bool:
        if not self.dtype.is_floating_point:
            return True
        x = self.mine()
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
        return torch.equal(x, self.full((self.size + 1) / 2))

    def broadcast(self) -> bool:
        x = self.mine()
        dist.broadcast(x, 0)
        return torch.equal(x, self.full(1))

    def all_gather(self) -> bool:
        out, parts = self.full(0, WIDTH * self.size), [self.full(0) for _ in range(self.size)]
        dist.all_gather_into_tensor(out, self.mine())
        dist.all_gather(parts, self.mine())
        return torch.equal(out, self.everyone()) and torch.equal(torch.cat(parts), self.everyone())

    def all_gather_in_place(self) -> bool:
        out = self.full(0, WIDTH * self.size)
        own = out.narrow(0, WIDTH * self.rank, WIDTH).copy_(self.mine())
        handle = dist.all_gather_into_tensor(out, own, async_op=True)
        assert handle is not None
        handle.wait()
        return torch.equal(out, self.everyone())

    def reduce_scatter(self) -> bool:
        out = self.full(0)
        dist.reduce_scatter_tensor(out, self.mine(self.size))
        return torch.equal(out, self.full(self.total))

    def reduce_scatter_in_place(self) -> bool:
        buffer = self.mine(self.size)
        own = buffer.narrow(0, WIDTH * self.rank, WIDTH)
        handle = dist.reduce_scatter_tensor(own, buffer, async_op=True)
        assert handle is not None
        handle.wait()
        return torch.equal(own, self.full(self.total))

    def all_to_all(self) -> bool:
        out = self.full(0, WIDTH * self.size)
        dist.all_to_all_single(out, self.mine(self.size))
        return torch.equal(out, self.everyone())

    def all_to_all_uneven(self) -> bool:
        send = list(range(1, self.size + 1))
        receive = [self.rank + 1] * self.size
        out = self.full(0, sum(receive))
        dist.all_to_all_single(out, self.full(self.rank + 1, sum(send)), receive, send)
        return torch.equal(out, self.everyone(self.rank + 1))

    def coalesced(self) -> bool:
        reduced = [self.mine(self.size) for _ in range(2)]
        scattered = [x.clone() for x in reduced]
        gathered = [self.full(0, WIDTH * self.size) for _ in range(2)]
        own = slice(WIDTH * self.rank, WIDTH * (self.rank + 1))
        for run in (
            lambda x: dist.all_reduce(reduced[x], async_op=True),
            lambda x: dist.reduce_scatter_tensor(scattered[x][own], scattered[x], async_op=True),
            lambda x: dist.all_gather_into_tensor(gathered[x], self.mine(), async_op=True),
        ):
            with _coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
                for index in range(2):
                    run(index)
            manager.wait()
        return all(
            torch.equal(reduced[i], self.full(self.total, WIDTH * self.size))
            and torch.equal(scattered[i][own], self.full(self.total))
            and torch.equal(gathered[i], self.everyone())
            for i in range(2)
        )

    def neighbours(self) -> bool:
        out = self.full(0)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [dist.P2POp(dist.isend, self.mine(), after), dist.P2POp(dist.irecv, out, before)]
        for request in dist.batch_isend_irecv(ops):
            request.wait()
        return torch.equal(out, self.full(before + 1))


COLLECTIVES: tuple[Callable[[Check], bool], ...] = (
    Check.all_reduce,
    Check.all_reduce_average,
    Check.broadcast,
    Check.all_gather,
    Check.all_gather_in_place,
    Check.reduce_scatter,
    Check.reduce_scatter_in_place,
    Check.all_to_all,
    Check.all_to_all_uneven,
    Check.coalesced,
    Check.neighbours,
)


def wrong(rank: int, world_size: int, *, dtype: torch.dtype) -> list[str]:
    check = Check(rank, world_size, dtype)
    return [run.__name__ for run in COLLECTIVES if not run(check)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gloo_has_every_collective_that_we_use(pool: Pool, dtype: torch.dtype) -> None:
    assert pool.run(wrong, 3, dtype=dtype) == [[], [], []]
