"""Capacity by a target drop rate: by hand, and under loads that are chosen to disturb it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.moe import MoELayer
from megatron_moe.moe.adaptive_capacity import (
    HOLD,
    MARGIN,
    SIZES,
    WINDOW,
    DropsBySize,
    LayerCapacity,
    first_size,
    sizes_of,
)
from megatron_moe.moe.plan import Capacity
from tests.moe.cases import BATCH, SEQUENCE, layer_of, moe_config, tokens

TARGET = 0.1
Rates = Callable[[int, int, random.Random], list[float]]
"""Of the step, the size in use and random numbers: what each size would drop, never rising."""


def falling(rng: random.Random) -> list[float]:
    return sorted((rng.random() ** 3 for _ in range(SIZES)), reverse=True)


def jumping(step: int, size: int, rng: random.Random) -> list[float]:
    """All or nothing, with the period that a controller of this window is slowest to follow."""
    return [1.0] * SIZES if step // HOLD % 2 else [0.0] * SIZES


def spiteful(step: int, size: int, rng: random.Random) -> list[float]:
    """Always just too much at the size in use, just enough below it."""
    return [1.0 if i <= size else 0.0 for i in range(SIZES)] if step % 2 else [0.0] * SIZES


LOADS: dict[str, Rates] = {
    "random": lambda step, size, rng: falling(rng),
    "jumping": jumping,
    "spiteful": spiteful,
    "nothing drops": lambda step, size, rng: [0.0] * SIZES,
    "all drops": lambda step, size, rng: [1.0] * SIZES,
}


def run(loads: Rates, steps: int, start: int = 5, seed: int = 0) -> list[LayerCapacity]:
    state, rng, found = LayerCapacity(size=start), random.Random(seed), []
    for step in range(steps):
        state = state.after(loads(step, state.size, rng), TARGET)
        found.append(state)
    return found


@pytest.mark.parametrize("name", LOADS)
def test_sizes_are_bounded_and_change_rarely(name: str) -> None:
    """It shrinks by one size in `HOLD` steps at most, so it cannot grow more often in the end."""
    steps, start = 400, 5
    found = run(LOADS[name], steps, start)
    sizes = [start, *(state.size for state in found)]
    assert all(0 <= size < SIZES for size in sizes)
    moves = [b - a for a, b in itertools.pairwise(sizes)]
    assert all(move >= -1 for move in moves)
    shrinks = [i for i, move in enumerate(moves) if move < 0]
    assert all(b - a >= HOLD for a, b in itertools.pairwise(shrinks))
    assert len(shrinks) <= steps / HOLD
    assert sum(move > 0 for move in moves) <= len(shrinks) + SIZES
    assert found == run(LOADS[name], steps, start), "the same decisions again"


def drops_in_training(steps: int, layers: int, seed: int) -> Tensor:
    """Shares that each size would drop, [steps, layers, S]: layers of 16 experts and 2048 tokens
    whose loads are unequal, more so in later layers, and become balanced from step 60 on.
    """
    moe = MoEConfig(num_experts=16, moe_capacity_rule="megatron", moe_target_drop_rate=0.05)
    generator = torch.Generator().manual_seed(seed)
    skew_LE = torch.randn(layers, 16, generator=generator)
    skew_LE *= 0.2 + 0.25 * torch.arange(layers).unsqueeze(1)
    found = torch.zeros(steps, layers, SIZES)
    for step in range(steps):
        share_LE = (skew_LE * 0.99 ** max(0, step - 60)).softmax(1)
        for layer, share_E in enumerate(share_LE):
            chosen = torch.multinomial(share_E, 4096, replacement=True, generator=generator)
            counter = DropsBySize(moe)
            load_GE = chosen.bincount(minlength=16).unsqueeze(0)
            counter.add(load_GE, Capacity(group_size=2048, groups=1, slots=1))
            found[step, layer] = counter.counts[:SIZES] / counter.counts[SIZES]
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_target_is_held_with_less_padding_than_by_one_fixed_factor(seed: int) -> None:
    """Rows of buffers are proportional to the factor. The fixed one drops as much over all steps
    and layers, but most of it in few layers and early steps.
    """
    steps, layers, target = 300, 4, 0.05
    rates = drops_in_training(steps, layers, seed)
    sizes = sizes_of(MoEConfig())
    used, dropped = [], []
    for layer in range(layers):
        decided = [LayerCapacity(size=first_size(MoEConfig()))] * 2
        for step in range(steps):
            size = decided[step].size  # of the steps up to the last but one
            used.append(sizes[size])
            dropped.append(float(rates[step, layer, size]))
            decided.append(decided[-1].after(rates[step, layer].tolist(), target))
    mean = sum(dropped) / len(dropped)
    assert 0.3 * target < mean <= target
    # The factor at which all would drop as much, between two sizes.
    fixed = rates.mean((0, 1)).flip(0).numpy()
    needed = float(np.interp(mean, fixed, sizes[::-1]))
    assert sum(used) / len(used) < 0.9 * needed, (sum(used) / len(used), needed)


@pytest.mark.parametrize("seed", range(5))
def test_steady_loads_settle_at_the_smallest_size_within_the_target(seed: int) -> None:
    rng = random.Random(seed)
    rates = falling(rng)
    found = run(lambda *_: rates, 300, start=rng.randrange(SIZES))
    needed = next((i for i, rate in enumerate(rates) if rate <= TARGET), SIZES - 1)
    last = found[-1].size
    # One larger at most, where the smaller one is within the margin of the target.
    assert last == needed or rates[last - 1] > TARGET * (1 - MARGIN)
    assert last in (needed, needed + 1)
    assert len({state.size for state in found[-100:]}) == 1


def test_noise_around_the_target_does_not_make_it_change_to_and_fro() -> None:
    """Two sizes of which one drops a little more than the target allows, the other none."""

    def noisy(step: int, size: int, rng: random.Random) -> list[float]:
        return [TARGET * rng.uniform(0.9, 1.1)] * 6 + [0.0] * (SIZES - 6)

    found = run(noisy, 1000)
    assert sum(a.size != b.size for a, b in itertools.pairwise(found)) <= 2


def test_the_mean_by_hand() -> None:
    """A plain mean of the first `WINDOW` steps, then each step counts 1 / `WINDOW`."""
    state = LayerCapacity(size=SIZES - 1)
    for step in range(WINDOW):
        state = state.after([float(step)] * SIZES, TARGET)
    assert state.means[0] == pytest.approx((WINDOW - 1) / 2)
    state = state.after([10.0] * SIZES, TARGET)
    assert state.means[0] == pytest.approx((WINDOW - 1) / 2 * (1 - 1 / WINDOW) + 10 / WINDOW)


def test_it_grows_at_once_and_shrinks_late() -> None:
    state = LayerCapacity(size=3).after([1.0] * 7 + [0.0] * (SIZES - 7), TARGET)
    assert (state.size, state.age) == (7, 0)
    sizes = []
    for _ in range(WINDOW * 8):
        state = state.after([0.0] * SIZES, TARGET)
        sizes.append(state.size)
    assert sizes[: HOLD - 1] == [7] * (HOLD - 1)
    assert sizes[-1] < 7


def test_sizes_and_the_first_one() -> None:
    sizes = sizes_of(MoEConfig())
    assert (sizes[0], sizes[-1], len(sizes)) == (0.5, 4.0, SIZES)
    ratios = [b / a for a, b in itertools.pairwise(sizes)]
    assert max(ratios) / min(ratios) < 1.01
    assert sizes[first_size(MoEConfig(moe_expert_capacity_factor=1.25))] == 1.189
    assert first_size(MoEConfig(moe_expert_capacity_factor=4.0)) == SIZES - 1


def counted(layer: MoELayer) -> list[float]:
    assert layer.drops_by_size is not None
    return list(layer.drops_by_size.counts.tolist())


def test_what_is_counted_is_what_would_drop() -> None:
    """Each size tried in turn drops what the first pass has counted for it."""
    layer = layer_of(moe_config(moe_target_drop_rate=0.1))
    layer(tokens(1))
    expected = counted(layer)
    assert expected[-1] == SEQUENCE * BATCH * 2
    assert expected[0] > expected[-2]
    for number, factor in enumerate(sizes_of(layer.moe)):
        layer.statistics.reset()
        layer.set_capacity_factor(factor)
        layer(tokens(1))
        load, kept = layer.statistics.sums[:4].sum(), layer.statistics.sums[4:8].sum()
        assert float(load - kept) == expected[number], factor


def test_what_counts_counts_once() -> None:
    """Not evaluation, not the first pass of a recomputed layer, not padding."""
    layer = layer_of(moe_config(moe_target_drop_rate=0.1))
    with torch.no_grad():
        layer(tokens(1))
    layer.eval()
    layer(tokens(1))
    assert counted(layer) == [0.0] * (SIZES + 1)
    layer.train()
    layer(tokens(1), torch.arange(SEQUENCE)[:, None].expand(-1, BATCH) >= 5)
    assert counted(layer)[-1] == 5 * BATCH * 2


def test_each_layer_has_its_factor() -> None:
    """The layers 1 and 3 of 4 are the first and the second MoE layer."""
    moe = moe_config(moe_layer_capacity_factors=(2.0, 0.5))
    assert [moe.of_layer(i, 4).moe_expert_capacity_factor for i in (1, 3)] == [2.0, 0.5]
    layer = layer_of(moe)  # number 3
    assert layer.dispatcher.moe.moe_expert_capacity_factor == 0.5
    assert moe.with_most_capacity.moe_expert_capacity_factor == 2.0
    target = moe_config(moe_target_drop_rate=0.1, moe_capacity_factor_range=(0.5, 3.0))
    assert target.with_most_capacity.moe_expert_capacity_factor == 3.0
