"""One MoE layer, forward and backward, fp32 on this device: ours, Megatron-Core's, and the floor.

    python -m bench.moe_layer

All candidates of a shape run round after round, each round in another order, and ratios are medians
over rounds, so that a slow moment of the machine hits them alike. The floor is the bare GEMMs over
the rows really kept, the better of one GEMM per expert and one batched GEMM; its outputs are
allocated beforehand.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench._moe_layer_cases import (
    CAPACITY_FACTOR,
    SHAPES,
    Shape,
    Step,
    bare_gemms,
    kept_rows,
    our_layer,
    stock_layer,
)
from bench._one_rank import one_rank
from bench._own_process import in_own_process
from bench.record import Record
from megatron_moe.config import RunConfig

SECONDS_PER_SHAPE = 30.0
ROUNDS = (15, 200)
"""Least and most rounds of a shape."""
LARGE_TOKENS = 2048
"""Shapes with as many tokens or more are bound by GEMMs and held to the tighter bound."""
FLOOR_BOUND = {"large": 1.15, "small": 1.5}
STOCK_CAPACITY_SPEEDUP = 1.5


def interleaved_seconds(
    candidates: dict[str, Callable[[], None]], seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that is not counted.

    Each round has an order of its own: what ran before leaves its own code and data in the caches,
    and no candidate shall always follow the same other.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffler = list(candidates), random.Random(0)
    for step in candidates.values():
        step()
    start = time.perf_counter()
    for turn in range(rounds[1]):
        shuffler.shuffle(order)
        for name in order:
            before = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - before)
        if turn + 1 >= rounds[0] and time.perf_counter() - start > seconds:
            break
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the quotient: a machine that grows slower meanwhile changes neither."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_mib(step: Callable[[], None]) -> float:
    """Most memory that one pass holds at once beyond what exists before it, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        most = max(most, held)
    return most / 2**20


def _candidates(shape: Shape, pgs: Any) -> dict[str, Callable[[], None]]:
    x_SBH = shape.tokens_SBH(seed=1)
    port, t5x = (our_layer(shape, rule, CAPACITY_FACTOR) for rule in ("port", "t5x"))
    rows_port, rows_t5x = kept_rows(port, x_SBH), kept_rows(t5x, x_SBH)
    return {
        "ours": Step(port, x_SBH),
        "floor loop": bare_gemms(shape, rows_port, batched=False),
        "floor batched": bare_gemms(shape, rows_port, batched=True),
        "stock capacity": Step(stock_layer(shape, CAPACITY_FACTOR, pgs), x_SBH),
        "stock dropless": Step(stock_layer(shape, None, pgs), x_SBH),
        "ours t5x": Step(t5x, x_SBH),
        "floor t5x loop": bare_gemms(shape, rows_t5x, batched=False),
        "floor t5x batched": bare_gemms(shape, rows_t5x, batched=True),
        "ours dropless": Step(our_layer(shape, "port", None), x_SBH),
    }


def _judge(shape: Shape, times: dict[str, list[float]]) -> list[Record]:
    """The numbers of one shape and the targets they are held to."""
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}

    def over(ours: str, *floors: str) -> float:
        return median_ratio(times[ours], times[min(floors, key=ms.__getitem__)])

    size = "large" if shape.tokens >= LARGE_TOKENS else "small"
    bound = FLOOR_BOUND[size]
    over_port = over("ours", "floor loop", "floor batched")
    over_t5x = over("ours t5x", "floor t5x loop", "floor t5x batched")
    capacity, dropless = (over(f"stock {kind}", "ours") for kind in ("capacity", "dropless"))
    least = STOCK_CAPACITY_SPEEDUP if size == "small" else 1.0
    prefix = f"moe_layer/{shape.name}"
    ratios = [
        ("over floor", over_port, "x", f"<= {bound}", over_port <= bound),
        ("over floor, rule t5x", over_t5x, "x", f"<= {bound}", over_t5x <= bound),
        ("speedup on stock capacity", capacity, "x", f">= {least}", capacity >= least),
        ("speedup on stock dropless", dropless, "x", ">= 1.0", dropless >= 1.0),
    ]
    records = [
        Record(name=f"{prefix}/{name}", value=value, unit=unit, target=target, met=met)
        for name, value, unit, target, met in ratios
    ]
    return records + [
        Record(name=f"{prefix}/{name}", value=value, unit="ms") for name, value in ms.items()
    ]


def _memory(shape: Shape, candidates: dict[str, Callable[[], None]]) -> list[Record]:
    """Peaks of whole layers, and what one [tokens, experts, capacity] mask in fp32 would take."""
    prefix = f"moe_layer/{shape.name}/peak memory"
    slots = CAPACITY_FACTOR * shape.topk * shape.tokens / shape.experts
    mask = 4 * shape.tokens * shape.experts * slots / 2**20
    found = [Record(name=f"{prefix}, a mask we do not make", value=mask, unit="MiB")]
    for name in ("ours", "ours t5x", "stock capacity", "stock dropless"):
        step = candidates[name]
        assert isinstance(step, Step)
        found.append(Record(name=f"{prefix}, {name}", value=peak_mib(step), unit="MiB"))
    return found


def _records(shape: Shape) -> list[Record]:
    torch.manual_seed(0)
    with one_rank(RunConfig()) as ctx:
        candidates = _candidates(shape, ctx.pgs)
        found = _judge(shape, interleaved_seconds(candidates, SECONDS_PER_SHAPE, ROUNDS))
        return found + _memory(shape, candidates)


def records() -> list[Record]:
    """Measure every shape, each in a process of its own."""
    return [record for shape in SHAPES for record in in_own_process(_records, shape)]


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
