"""Formulas against hand-worked cases, loops and simulations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megatron_moe.analysis.weights import statistics as own


def test_cosines() -> None:
    vectors = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    found = own.cosines(vectors @ vectors.T)
    assert found[0, 1] == pytest.approx(math.sqrt(0.5))
    assert np.isnan(found[2]).all() and np.isnan(found[:, 2]).all()
    assert own.pairs_of(np.arange(9.0).reshape(3, 3)).tolist() == [1, 2, 5]


@pytest.mark.parametrize("pairs", [1, 6, 496])
def test_the_largest_cosine_by_chance(pairs: int) -> None:
    drawn = np.random.default_rng(0).standard_normal((20_000, pairs)).max(1).mean() / 10
    assert own.largest_by_chance(pairs, 100) == pytest.approx(drawn, abs=0.003)
    assert math.isnan(own.largest_by_chance(0, 100))


def test_effective_rank_by_hand() -> None:
    assert own.effective_rank(np.eye(5) * 7) == pytest.approx(5)
    assert own.effective_rank(np.ones((5, 5))) == pytest.approx(1)
    # Two equal vectors and one orthogonal to them: eigenvalues 2, 1, 0 of 3.
    gram = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert own.effective_rank(gram) == pytest.approx(
        math.exp(-2 / 3 * math.log(2 / 3) - math.log(1 / 3) / 3)
    )
    assert math.isnan(own.effective_rank(np.diag([1.0, 0.0])))


@pytest.mark.parametrize(("count", "size"), [(32, 64), (64, 64), (16, 1000), (64, 24)])
def test_effective_rank_of_random_vectors(count: int, size: int) -> None:
    drawn = np.random.default_rng(1).standard_normal((20, count, size))
    found = np.mean([own.effective_rank(each @ each.T) for each in drawn])
    assert own.random_effective_rank(count, size) == pytest.approx(found, rel=0.03)


def test_components_are_those_of_the_vectors() -> None:
    vectors = np.random.default_rng(2).standard_normal((6, 40)) + 3
    place, share = own.components(vectors @ vectors.T, 2)
    centred = vectors - vectors.mean(0)
    left, value, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(share, (value**2 / (value**2).sum())[:5], atol=1e-12)
    np.testing.assert_allclose(np.abs(place), np.abs(left[:, :2] * value[:2]), atol=1e-9)
    assert own.components(np.ones((3, 3)), 2)[1].tolist() == [0, 0]
    place, share = own.components(np.array([[2.0]]), 2)
    assert place.tolist() == [[0, 0]] and share.size == 0


def test_first_component_of_random_vectors() -> None:
    drawn = np.random.default_rng(3).standard_normal((5, 200, 300))
    found = np.mean([own.components(each @ each.T, 1)[1][0] for each in drawn])
    assert own.random_first_share(200, 300) == pytest.approx(found, rel=0.05)


def _symmetric(generator: np.random.Generator, size: int) -> np.ndarray:
    values = generator.standard_normal((size, size))
    return values + values.T


def test_mantel_counts_the_permutations() -> None:
    """Against all 120 orders of five things."""
    generator = np.random.default_rng(4)
    x = _symmetric(generator, 5)
    y = x + 0.8 * _symmetric(generator, 5)
    upper = np.triu_indices(5, 1)
    every = [
        np.corrcoef(x[upper], y[np.ix_(order, order)][upper])[0, 1]
        for order in map(list, itertools.permutations(range(5)))
    ]
    r, p, square = own.mantel(x, y, 4000, np.random.default_rng(5))
    assert r == pytest.approx(every[0])
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(r) - 1e-12), abs=0.02)
    assert square == pytest.approx(np.mean(np.square(every)), abs=0.02)


def test_mantel_has_the_level_of_its_p_value() -> None:
    generator = np.random.default_rng(6)
    pairs = [(_symmetric(generator, 8), _symmetric(generator, 8)) for _ in range(400)]
    found = np.array([own.mantel(x, y, 99, generator) for x, y in pairs])
    assert 0.02 < (found[:, 1] <= 0.05).mean() < 0.08
    assert found[:, 2].mean() == pytest.approx(1 / 27, abs=0.006)  # 28 pairs


def test_combined_p_values() -> None:
    for values in ([0.3], [0.01, 0.2, 0.7], [0.005] * 40, [1.0, 1.0]):
        expected = stats.combine_pvalues(values).pvalue
        assert own.combined_p_value(np.array(values)) == pytest.approx(expected)
    assert own.combined_p_value(np.array([0.2, np.nan])) == pytest.approx(0.2)
    assert math.isnan(own.combined_p_value(np.array([np.nan])))


def test_correlations_that_are_not_defined() -> None:
    for size in (1, 2):
        assert all(
            map(math.isnan, own.mantel(np.eye(size), np.eye(size), 9, np.random.default_rng()))
        )
    assert math.isnan(own.pearson(np.ones(4), np.arange(4.0)))
    assert math.isnan(own.mean_of(np.array([np.nan])))
    assert math.isnan(own.kendall(np.array([0]))) and math.isnan(own.kendall_deviation(1))


def test_kendall_and_ranks() -> None:
    generator = np.random.default_rng(7)
    order = generator.permutation(50)
    assert own.kendall(order) == pytest.approx(stats.kendalltau(np.arange(50), order).statistic)
    assert (own.kendall(np.arange(9)), own.kendall(np.arange(9)[::-1])) == (1, -1)
    drawn = np.std([own.kendall(generator.permutation(20)) for _ in range(4000)])
    assert own.kendall_deviation(20) == pytest.approx(drawn, rel=0.05)
    x, y = generator.standard_normal((2, 30))
    assert own.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
