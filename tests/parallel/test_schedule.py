"""Gradients of a step on many layouts against a twin in plain torch; a defect of Megatron-Core.

All layouts run one after another in the same processes, so they also show that `destroy_parallel`
leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.errors import UsageError
from megatron_moe.parallel import schedule
from megatron_moe.parallel.schedule import forward_backward
from tests.support import toy
from tests.support.pool import Pool
from tests.support.toy import Shard

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
VPP = "num_layers_per_virtual_pipeline_stage"
SP = "sequence_parallel"
OVERLAP = {"overlap_grad_reduce": True}
SHARDED = {"use_distributed_optimizer": True}

LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (2, {}, {}),
    (2, {PP: 2}, {}),
    (2, {PP: 2, VPP: 1}, {}),
    (2, {PP: 2, VPP: 1}, OVERLAP),
    (2, {TP: 2, SP: True, ETP: 1}, {}),
    (2, {EP: 2}, {}),
    (2, {}, OVERLAP),
    (4, {PP: 4}, {}),
    (4, {PP: 2, TP: 2, SP: True, ETP: 1, EP: 2}, OVERLAP),
    (4, {PP: 2, VPP: 1, EP: 2}, {}),
    (4, {EP: 2}, OVERLAP),
]


def step(
    rank: int, world_size: int, *, parallel: dict[str, Any], ddp: dict[str, Any]
) -> tuple[list[float], list[tuple[Shard, Tensor]], int]:
    """Losses, gradients, and how often `before_reduction` was called."""
    ctx = toy.context(world_size, **parallel)
    chunks = toy.wrap(ctx, toy.build_chunks(ctx), **ddp)
    called = []
    reported = forward_backward(
        ctx,
        toy.forward_step,
        toy.micro_batches(ctx.layout, ctx.dp_rank),
        chunks,
        before_reduction=lambda: called.append(1),
    )
    return [float(r["loss"]) for r in reported], toy.gradients(chunks), len(called)


def largest_error(results: list[Any]) -> float:
    """Largest relative difference, over all ranks and parameters, from the twin's gradients."""
    _, expected = toy.twin()
    worst = 0.0
    for _, found, *_ in results:
        for shard, grad in found:
            want = shard.of(expected[shard.name], grad.shape[shard.dim or 0])
            worst = max(worst, float((grad - want).norm() / want.norm()))
    return worst


def names(results: list[Any]) -> set[str]:
    return {shard.name for _, found, *_ in results for shard, _ in found}


@pytest.mark.parametrize(("world_size", "parallel", "ddp"), LAYOUTS)
def test_gradients_equal_those_of_plain_torch(
    pool: Pool, world_size: int, parallel: dict[str, Any], ddp: dict[str, Any]
) -> None:
    results = pool.run(step, world_size, parallel=parallel, ddp=ddp)
    loss, expected = toy.twin()
    assert names(results) == set(expected)
    assert largest_error(results) < 1e-4
    losses = [value for reported, *_ in results for value in reported]
    assert sum(losses) / len(losses) == pytest.approx(loss, rel=1e-5)
    assert [called for *_, called in results] == [1] * world_size


def changing(rank: int, world_size: int, *, parallel: dict[str, Any]) -> Any:
    """Gradients of a step whose predecessor had half as many micro-batches."""
    ctx = toy.context(world_size, **parallel)
    chunks = toy.wrap(ctx, toy.build_chunks(ctx), **OVERLAP)
    batches = toy.micro_batches(ctx.layout, ctx.dp_rank)
    for number in (len(batches) // 2, len(batches)):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        forward_backward(ctx, toy.forward_step, batches[:number], chunks)
    return [], toy.gradients(chunks)


@pytest.mark.parametrize("parallel", [{}, {PP: 2, VPP: 1}], ids=["plain", "interleaved"])
def test_overlapped_reduction_waits_for_the_last_micro_batch(
    pool: Pool, parallel: dict[str, Any]
) -> None:
    """Megatron-Core counts gradients in its first step; their number may change in later ones."""
    assert largest_error(pool.run(changing, 2, parallel=parallel)) < 1e-4


def defective(rank: int, world_size: int) -> Any:
    """Interleaving as Megatron-Core does it without overlapped transfers."""
    ours = schedule._set_p2p_overlap
    schedule._set_p2p_overlap = lambda config, *, interleaved: None  # type: ignore[assignment]
    try:
        return step(rank, world_size, parallel={PP: 2, VPP: 1}, ddp={})
    finally:
        schedule._set_p2p_overlap = ours


def test_interleaving_without_overlapped_transfers_is_still_wrong(
    pool: Pool,
) -> None:
    """If this fails, Megatron-Core has fixed it, and `_set_p2p_overlap` can be reconsidered."""
    assert largest_error(pool.run(defective, 2)) > 0.1


def synchronizations(rank: int, world_size: int) -> int:
    """How often the host waits for the device in a step of the plain schedule."""
    ctx = toy.context(world_size, **{PP: world_size})
    chunks = toy.wrap(ctx, toy.build_chunks(ctx))
    count, wait = [], torch.cuda.synchronize
    torch.cuda.synchronize = lambda *_: count.append(1)
    try:
        forward_backward(ctx, toy.forward_step, toy.micro_batches(ctx.layout, 0), chunks)
    finally:
        torch.cuda.synchronize = wait
    return len(count)


def test_the_host_does_not_wait_between_micro_batches(pool: Pool) -> None:
    assert pool.run(synchronizations, 2) == [0, 0]


def odd_number(rank: int, world_size: int) -> str:
    ctx = toy.context(world_size, **{PP: 2, VPP: 1})
    chunks = toy.wrap(ctx, toy.build_chunks(ctx))
    try:
        forward_backward(ctx, toy.forward_step, toy.micro_batches(ctx.layout, 0)[:3], chunks)
    except UsageError as error:
        return str(error)
    return "accepted"


def test_interleaving_rejects_micro_batches_that_do_not_fill_groups(pool: Pool) -> None:
    message = (
        "number of micro-batches must be a multiple of --pipeline-model-parallel-size (2) (got 3)"
    )
    assert pool.run(odd_number, 2) == [message] * 2


def forward_only(rank: int, world_size: int) -> tuple[list[float], bool]:
    ctx = toy.context(world_size, **{PP: 2})
    chunks = toy.wrap(ctx, toy.build_chunks(ctx))
    batches = toy.micro_batches(ctx.layout, ctx.dp_rank)
    with torch.no_grad():
        reported = forward_backward(ctx, toy.forward_step, batches, chunks, forward_only=True)
    untouched = all(not grad.any() for _, grad in toy.gradients(chunks))
    return [float(entry["loss"]) for entry in reported], untouched


def test_forward_only_reports_on_the_last_stage_and_leaves_gradients_alone(pool: Pool) -> None:
    first, last = pool.run(forward_only, 2)
    assert first == ([], True)
    assert last[1]
    assert sum(last[0]) / len(last[0]) == pytest.approx(toy.twin()[0], rel=1e-5)
