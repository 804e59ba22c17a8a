"""The table of shards: on every layout it tiles the logical model, and the weights are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.model.logical import initial_tensors, logical_parameters
from tests.parity.cases import GROUPED, LAYOUTS, SLOW_LAYOUTS, VOCAB, Layout, run_config
from tests.parity.compare import Block, assemble, assert_same
from tests.support.pool import Pool


def local_weights(rank: int, world_size: int, variant: str, flags: dict[str, Any]) -> list[Block]:
    """The initial weights of this rank, by logical block."""
    from tests.parity.harness import build, weight_blocks

    chunks, _ctx, config = build(variant, flags, world_size)
    return weight_blocks(chunks, config)


def test_initial_weights_do_not_depend_on_the_layout(pool: Pool) -> None:
    _check(pool, LAYOUTS)


def test_nor_do_those_of_grouped_heads(pool: Pool) -> None:
    _check(pool, [layout for layout in LAYOUTS if layout.name in ("1", "TP2", "PP2")], GROUPED)


@pytest.mark.slow
def test_initial_weights_of_eight_ranks(pool: Pool) -> None:
    _check(pool, SLOW_LAYOUTS)


def _check(
    pool: Pool, layouts: list[Layout], variants: tuple[str, ...] = ("released", "paper-port")
) -> None:
    for variant in variants:
        config = run_config(variant, {})
        table = logical_parameters(config.model, config.moe, VOCAB)
        expected = dict(initial_tensors(table, config.train.seed))
        for layout in layouts:
            ranks = pool.run(local_weights, layout.world_size, variant=variant, flags=layout.flags)
            # `assemble` also holds that replicas agree and that nothing is uncovered.
            found = assemble(block for blocks in ranks for block in blocks)
            assert_same(found, expected, 0.0)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
