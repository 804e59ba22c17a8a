"""Exchanges that overlap with computation: equal bit for bit, and in the order that hides them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.moe.chunks import SlotChunks
from tests.moe import ranks
from tests.support.pool import Pool

BATCHED: dict[str, Any] = {"moe_expert_impl": "batched"}


def test_rows_of_chunks_lie_together() -> None:
    """The example of `SlotChunks.rows`; then five slots in three chunks of 1, 2 and 2."""
    assert SlotChunks(3, 2).rows(torch.arange(6), 2).tolist() == [0, 2, 3, 1, 4, 5]
    chunks = SlotChunks(5, 3)
    assert chunks.bounds == [0, 1, 3, 5]
    rows = chunks.rows(torch.arange(20).view(4, 5), 4)
    assert rows.tolist() == [
        [0, 4, 5, 12, 13], [1, 6, 7, 14, 15], [2, 8, 9, 16, 17], [3, 10, 11, 18, 19]
    ]  # fmt: skip


@pytest.mark.parametrize(("tp", "chunks"), [(1, 3), (2, 2)])
def test_results_are_those_of_one_piece_bit_for_bit(pool: Pool, tp: int, chunks: int) -> None:
    """Outputs and all gradients, beside a parallel shared expert, in three dtypes."""
    pool.run(ranks.check_overlap, 2, tp=tp, chunks=chunks)


def test_an_exchange_runs_while_another_chunk_is_computed(pool: Pool) -> None:
    """The calls of both ranks in their order; those of the shared expert are marked."""
    for steps in pool.run(ranks.overlap_timeline, 2, chunks=3):
        assert steps == [
            *(f"launch dispatch {chunk}" for chunk in range(3)),
            "shared expert",
            *("wait dispatch 0", "experts 0", "launch combine 0"),
            *("wait dispatch 1", "experts 1", "launch combine 1"),
            *("wait dispatch 2", "experts 2", "launch combine 2"),
            *(f"wait combine {chunk}" for chunk in range(3)),
            *(f"launch gradient of combine {chunk}" for chunk in range(3)),
            *("wait gradient of combine 0", "gradients of experts 0"),
            *("launch gradient of dispatch 0", "wait gradient of combine 1"),
            *("gradients of experts 1", "launch gradient of dispatch 1"),
            *("wait gradient of combine 2", "gradients of experts 2"),
            *("launch gradient of dispatch 2", "gradients of weights"),
            "gradient of the shared expert",
            *(f"wait gradient of dispatch {chunk}" for chunk in range(3)),
        ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 2, 2), (4, 1, 4), (4, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("chunks", [2, 5])
def test_a_layout_equals_one_process(pool: Pool, layout: tuple[int, int, int], chunks: int) -> None:
    """More chunks than slots are as many as there are slots."""
    world_size, tp, ep = layout
    settings = {**BATCHED, "moe_a2a_overlap_chunks": chunks}
    dropped = pool.run(ranks.check_layout, world_size, tp=tp, ep=ep, etp=1, settings=settings)
    assert sum(dropped) > 0
