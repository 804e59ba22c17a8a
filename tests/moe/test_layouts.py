"""Every layout gives the outputs, drops and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.moe import ranks
from tests.support.pool import Pool

LAYOUTS = {
    "EP2": (2, 1, 2, 1),
    "EP4": (4, 1, 4, 1),
    "TP2": (2, 2, 1, 2),
    "TP2, whole experts": (2, 2, 1, 1),
    "TP2 over EP2": (2, 2, 2, 1),
    "TP2 x EP2": (4, 2, 2, 2),
    "EP2 x ETP2": (4, 1, 2, 2),
    "ETP2": (2, 1, 1, 2),
    "TP4, ETP2": (4, 4, 1, 2),
    "DP2 x EP2": (4, 1, 2, 1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "loop": {"moe_expert_impl": "loop"},
    "batched": {"moe_expert_impl": "batched"},
    "auto": {},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout(pool: Pool, layout: tuple[int, int, int, int], settings: dict[str, Any]) -> None:
    world_size, tp, ep, etp = layout
    dropped = pool.run(ranks.check_layout, world_size, tp=tp, ep=ep, etp=etp, settings=settings)
    assert sum(dropped) > 0


@pytest.mark.parametrize(
    "name",
    [
        "EP2 x ETP2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "EP2 x ETP2"),
    ],
)
def test_grouped_experts(pool: Pool, name: str) -> None:
    """With capacities, under which choices drop."""
    world_size, tp, ep, etp = LAYOUTS[name]
    settings = {"moe_expert_impl": "grouped"}
    dropped = pool.run(ranks.check_layout, world_size, tp=tp, ep=ep, etp=etp, settings=settings)
    assert sum(dropped) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_token_drop_policy": "probs"},
        {
            "moe_capacity_rule": "port",
            "moe_expert_capacity_factor": 0.6,
            "moe_router_load_balancing_type": "aux_loss",
        },
        {"moe_capacity_group_size": 3, "moe_router_topk": 3},
        {"moe_capacity_group_size": 4, "moe_router_load_balancing_type": "group_aux_loss"},
    ],
    ids=["probs", "one group", "groups of a shard", "groups across shards"],
)
def test_what_drops_does_not_depend_on_the_layout(pool: Pool, settings: dict[str, Any]) -> None:
    dropped = pool.run(ranks.check_layout, 4, tp=2, ep=2, etp=1, settings=settings)
    assert sum(dropped) > 0


def test_dropless(pool: Pool) -> None:
    settings = {"moe_expert_capacity_factor": None}
    assert pool.run(ranks.check_layout, 4, tp=2, ep=2, etp=2, settings=settings) == [0] * 4


def test_gradient_buffers_of_megatron_core(pool: Pool) -> None:
    pool.run(ranks.check_megatron_wrapper, 2)


def test_tensor_parallelism_needs_sequence_parallelism(pool: Pool) -> None:
    for answer in pool.run(ranks.needs_sequence_parallel, 2):
        assert answer == (
            "--sequence-parallel must be on with --tensor-model-parallel-size 2 (got 'off'); "
            "expert layers shard the sequence"
        )
