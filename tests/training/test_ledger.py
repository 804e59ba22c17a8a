"""A training run whose MoE layers do not account for every token ends, on all ranks."""

from __future__ import annotations

from typing import Any

from megatron_moe.moe.counter import RoutingCounter
from tests.training.tiny import MODEL, pretrain_rank


def uncounted(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, str, str]:
    """A run in which the last rank does not count one micro-batch of the first MoE layer."""
    whole, calls = RoutingCounter.add, [0]

    def add(counter: RoutingCounter, *values: Any) -> None:
        if counter.layer_number == 1:
            calls[0] += 1
            if rank == world_size - 1 and calls[0] == 3:
                return
        whole(counter, *values)

    RoutingCounter.add = add  # type: ignore[method-assign]
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        RoutingCounter.add = whole  # type: ignore[method-assign]


def test_a_micro_batch_that_is_not_counted_ends_the_run_on_every_rank(pool, corpus, tmp_path):
    """Four steps of eight sequences of 32 are 1024 tokens; two sequences are missing."""
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "8", "--log-interval", "4"]
    argv += ["--expert-model-parallel-size", "2", "--save", str(tmp_path), "--save-interval", "4"]
    results = pool.run(uncounted, 2, argv=argv)
    assert [code for code, *_ in results] == [1, 1], results
    assert results[0][1].splitlines()[-1] == (
        " error: MoE layer 1: tokens must add up to 1024, the positions of the steps"
        " (got 960 tokens routed)"
    )
    assert list(tmp_path.iterdir()) == [], "nothing is saved"
