"""Chance levels against simulation and closed formulas."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_moe.analysis.nulls import (
    by_size,
    drawn_shares,
    entropy,
    gini,
    p_value,
    uniform_loads,
)


def test_uniform_loads_have_the_moments_of_random_subsets() -> None:
    """50 tokens that choose 3 of 8."""
    rng = np.random.default_rng(0)
    drawn = uniform_loads(50, 3, 8, 4000, rng)
    own = np.stack(
        [
            np.bincount(
                rng.permuted(np.tile(np.arange(8), (50, 1)), axis=1)[:, :3].ravel(), minlength=8
            )
            for _ in range(4000)
        ]
    )
    np.testing.assert_allclose(drawn.sum(1), 150)
    np.testing.assert_allclose(drawn.var(0).mean(), own.var(0).mean(), rtol=0.05)
    np.testing.assert_allclose(drawn.max(1).mean(), own.max(1).mean(), rtol=0.02)
    assert (uniform_loads(50, 4, 4, 2, rng) == 50).all()


def test_drawn_shares_keep_loads_and_pairs_of_the_pool() -> None:
    pool = np.array([[0, 1], [2, 3], [2, 3], [2, 3]])
    shares = drawn_shares(pool, 5, 30, 2000, np.random.default_rng(0))
    np.testing.assert_allclose(shares.mean(0), [0.25, 0.25, 0.75, 0.75, 0], atol=0.01)
    np.testing.assert_array_equal(shares[:, 2], shares[:, 3])


def test_values_by_size() -> None:
    """Largest share of fair coins: 1, 3/4, 3/4 for 1, 2, 3 tokens; near 1/2 for many."""
    pool = np.array([[0], [1]])
    at = by_size(pool, 2, 5000, lambda s: s.max(-1), draws=4000, rng=np.random.default_rng(0))
    values = at(np.array([1, 2, 3, 400, 5000, 10**6]))
    np.testing.assert_allclose(values[:3], [1, 0.75, 0.75], atol=0.01)
    expected = 0.5 + np.sqrt(0.25 / 400) * np.sqrt(2 / np.pi)
    assert values[3] == pytest.approx(expected, abs=0.005)
    assert values[4] == values[5] == pytest.approx(0.506, abs=0.005)


def test_measures_by_hand() -> None:
    assert entropy(np.array([2, 2, 0, 0])) == pytest.approx(np.log(2))
    assert entropy(np.zeros(3)) == 0
    assert gini(np.array([1, 1, 1, 1])) == 0
    assert gini(np.array([0, 0, 0, 5])) == pytest.approx(0.75)
    assert gini(np.array([1.0, 2, 3])) == pytest.approx(2 / 9)
    assert p_value(3.0, np.array([1.0, 2, 3, 4])) == 3 / 5
