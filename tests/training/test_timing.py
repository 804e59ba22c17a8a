"""Timers of the parts of a step: what they hold, over which ranks, and when they stand still."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_moe.moe.exchange import ExchangeClock, all_to_all
from megatron_moe.parallel.schedule import megatron_config
from megatron_moe.training.timing import StepTimers
from tests.planning.ranks import planned_run
from tests.support.pool import Pool

SLEEP = 0.05
STEPS = 2


def slept(rank: int, world_size: int) -> tuple[dict[str, tuple[float, float]], ...]:
    """What three collections hold: the second one after a block that only rank 1 runs."""
    timers = StepTimers(2)
    for _ in range(STEPS):
        with timers.measure("forward-backward"):
            time.sleep(SLEEP * (1 + 2 * rank))
    first = dict(timers.collect(STEPS))
    if rank == 1:
        with timers.measure("batch-generator"):
            time.sleep(SLEEP)
    second = dict(timers.collect(1))
    with timers.measure("save-checkpoint"):
        time.sleep(SLEEP)
    return first, second, dict(timers.collect(1000))


def test_a_collection_has_the_least_and_most_since_the_last_one(pool: Pool) -> None:
    (first, second, third), other = pool.run(slept, 2)
    assert other == (first, second, third)
    assert list(first) == ["forward-backward"]
    least, most = first["forward-backward"]
    assert SLEEP <= least < most
    assert most >= 3 * SLEEP
    # The first part was collected, and rank 0 did not measure the other one.
    assert list(second) == ["batch-generator"]
    least, most = second["batch-generator"]
    assert SLEEP <= least == most
    # A save is no part of a step.
    assert third["save-checkpoint"][0] >= SLEEP


def switched(rank: int, world_size: int) -> list[bool]:
    """Whether Megatron-Core has timers: before, while they are paused, and after an error then."""
    run = planned_run(world_size, [])
    timers = StepTimers(2)
    timers.attach(run.chunks, run.optimizer)
    configs = [megatron_config(chunk) for chunk in run.chunks]
    found = [all(config.timers is not None for config in configs)]
    try:
        with timers.paused():
            found.append(any(config.timers is not None for config in configs))
            raise InterruptedError
    except InterruptedError:
        found.append(all(config.timers is not None for config in configs))
    return found


def test_what_megatron_core_does_while_they_are_paused_is_not_measured(pool: Pool) -> None:
    assert pool.run(switched, 1) == [[True, False, True]]


def exchanged(rank: int, world_size: int) -> list[str]:
    """What is measured of one exchange: forward, then backward."""
    seen: list[str] = []

    @contextlib.contextmanager
    def measure() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    x = torch.ones(2, 3, requires_grad=True)
    y = all_to_all(x, dist.new_group(backend="gloo"), ExchangeClock(measure))
    y.sum().backward()
    return seen


def test_exchanges_are_measured_forward_and_backward(pool: Pool) -> None:
    assert pool.run(exchanged, 2) == [["begin", "end"] * 2] * 2
