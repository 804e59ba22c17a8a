"""Every router, score and balance in every layout: loss and gradients equal the reference model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from megatron_moe.training.step import train_step
from tests.parity.cases import LAYOUTS, OF_THE_STEP, PLANES, ROUTERS, STATEFUL
from tests.parity.compare import Block, assemble, assert_same
from tests.parity.expected import expected
from tests.parity.harness import one_step, own_batches, prepare, weight_blocks
from tests.parity.test_layouts import RECOMPUTE, check, run
from tests.support.pool import Pool

BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.mark.parametrize("variant", ROUTERS)
def test_equals_reference(pool: Pool, variant: str) -> None:
    check(run(pool, BY_NAME["TP2xEP2"], variant, **RECOMPUTE["full"]), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTERS)
@pytest.mark.parametrize("name", ["1", "TP2", "PP2", "DP2", "EP2", "PP2-interleaved", "TP2xETP2"])
def test_other_layouts_equal_reference(pool: Pool, name: str, variant: str) -> None:
    check(run(pool, BY_NAME[name], variant), variant)


@pytest.mark.parametrize(
    "name",
    ["TP2xEP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "PP2", "DP2"))],
)
def test_pools_of_separate_documents_equal_reference(pool: Pool, name: str) -> None:
    layout, variant = BY_NAME[name], "document-pools"
    flags = {**layout.flags, **RECOMPUTE["selective"]}
    outcomes = pool.run(one_step, layout.world_size, variant=variant, flags=flags, extra=PLANES)
    check(outcomes, variant, PLANES)


@pytest.mark.parametrize("variant", OF_THE_STEP)
@pytest.mark.parametrize(
    "name",
    ["PP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1", "TP2", "TP2xEP2"))],
)
def test_losses_of_the_step_equal_reference(pool: Pool, name: str, variant: str) -> None:
    """On one data-parallel rank; with recomputation, which counts every micro-batch once."""
    layout = BY_NAME[name]
    check(run(pool, layout, variant, **RECOMPUTE["full"]), variant)


@dataclass(frozen=True)
class Trained:
    """What a rank has after a few steps; plain data."""

    weights: list[Block]
    norms: list[float]
    """Of the gradient, by step."""


def train(rank: int, world_size: int, variant: str, flags: dict[str, Any]) -> Trained:
    """Three steps through the production path, each on a global batch of its own."""
    run = prepare(variant, flags, world_size, lr=0.01)
    results = [
        train_step(run, own_batches(run.ctx, seed), 0.01, iteration=seed) for seed in (1, 2, 3)
    ]
    blocks = weight_blocks(list(run.chunks), run.config)
    return Trained(blocks, [result.grad_norm for result in results])


@cache
def _alone(pool: Pool, variant: str) -> Trained:
    found: Trained = pool.run(train, 1, variant=variant, flags={})[0]
    return found


def check_training(pool: Pool, name: str, variant: str, **flags: Any) -> None:
    layout, alone = BY_NAME[name], _alone(pool, variant)
    flags = {**layout.flags, **flags}
    ranks = pool.run(train, layout.world_size, variant=variant, flags=flags)
    expected = assemble(alone.weights)
    found = assemble(block for one in ranks for block in one.weights)
    assert_same(found, expected, 1e-3)
    assert ranks[0].norms == pytest.approx(alone.norms, rel=1e-4)
    state = [name for name in expected if "moe.router." in name and not name.endswith(".weight")]
    assert state and all(expected[name].any() for name in state)
    assert all((found[name] - expected[name]).abs().max() < 1e-6 for name in state)


@pytest.mark.parametrize(
    "variant",
    [*STATEFUL[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in STATEFUL[2:])],
)
def test_training_keeps_the_same_state(pool: Pool, variant: str) -> None:
    """With recomputation, which counts every token once."""
    check_training(pool, "TP2xEP2", variant, **RECOMPUTE["full"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", STATEFUL)
@pytest.mark.parametrize("name", ["TP2", "PP2", "DP2", "EP2", "PP2-interleaved"])
def test_training_keeps_the_same_state_in_other_layouts(
    pool: Pool, name: str, variant: str
) -> None:
    check_training(pool, name, variant)


def frozen(rank: int, world_size: int) -> list[list[bool]]:
    """Whether biases and weights of routers change, by step, with `--freeze-router-after 1`."""
    run = prepare("sign-bias", {}, world_size, lr=0.01, freeze_router_after=1)
    changed = []
    for step in (1, 2):
        before = {block.name: block.data for block in weight_blocks(list(run.chunks), run.config)}
        train_step(run, own_batches(run.ctx, step), 0.01, iteration=step)
        after = weight_blocks(list(run.chunks), run.config)
        names = ("moe.router.weight", "moe.router.expert_bias", "moe.experts.up")
        changed.append(
            [
                any(not torch.equal(b.data, before[b.name]) for b in after if b.name.endswith(name))
                for name in names
            ]
        )
    return changed


def test_a_frozen_router_keeps_its_bias(pool: Pool) -> None:
    assert pool.run(frozen, 1)[0] == [[True, True, True], [False, False, True]]


def test_tokens_are_dropped() -> None:
    for variant in ROUTERS:
        assert expected(variant).dropped > 5
