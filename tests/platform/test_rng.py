"""Random states are saved and restored completely; dropout on the tracker's streams repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.errors import UsageError
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform import rng_states, set_rng_states
from tests.support import toy
from tests.support.pool import Pool

STREAMS = ("data-parallel-rng", "expert-parallel-rng", "model-parallel-rng")


def draw() -> list[Tensor]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn = [torch.rand(2)]
    for name in STREAMS:
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand(2))
    return drawn


def round_trip(rank: int, world_size: int) -> tuple[list[str], bool, bool, str]:
    """Names; whether draws repeat once the states are restored; whether they differ otherwise."""
    toy.context(world_size)
    draw()
    saved = rng_states()
    first, following = draw(), draw()
    set_rng_states(saved)
    again = draw()
    try:
        set_rng_states({"cpu": saved["cpu"]})
    except UsageError as error:
        message = str(error)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    moved = all(not torch.equal(a, b) for a, b in zip(first, following, strict=True))
    return sorted(saved), same, moved, message


def test_states_go_round(pool: Pool) -> None:
    ((names, same, moved, message),) = pool.run(round_trip, 1)
    assert names == ["cpu", *(f"tracker.{name}" for name in STREAMS)]
    assert same and moved
    assert message.startswith(
        "names of random states must be ['cpu', 'tracker.data-parallel-rng', "
    )


def with_dropout(
    rank: int, world_size: int, *, recompute: bool, parallel: dict[str, Any]
) -> list[Tensor]:
    """Gradients of one step with dropout inside the tensor-parallel region."""
    ctx = toy.context(world_size, **parallel)
    chunks = toy.wrap(ctx, toy.build_chunks(ctx, dropout=0.5, recompute=recompute))
    forward_backward(ctx, toy.forward_step, toy.micro_batches(ctx.layout, ctx.dp_rank), chunks)
    return [grad for _, grad in toy.gradients(chunks)]


TP2 = {
    "tensor_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}


@pytest.mark.parametrize("parallel", [TP2, INTERLEAVED], ids=["TP2", "interleaved"])
def test_recomputation_repeats_dropout_bit_for_bit(pool: Pool, parallel: dict[str, Any]) -> None:
    stored = pool.run(with_dropout, 2, recompute=False, parallel=parallel)
    again = pool.run(with_dropout, 2, recompute=True, parallel=parallel)
    for one, other in zip(stored, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    whole = toy.twin()[1]["output"]
    plain = whole if parallel is INTERLEAVED else whole.chunk(2)[1]
    assert not torch.allclose(stored[1][-1], plain), "dropout did nothing"
