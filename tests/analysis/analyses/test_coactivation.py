"""Co-activation: forced pairs, a random router, the published count, pairs by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.coactivation import Coactivation, drawn_strength
from megatron_moe.analysis.nulls import independent_pairs
from megatron_moe.analysis.observation import TokenBatch
from tests.analysis.planted import Ids, PlantedModel, random_rule, random_sample, result_of


def _couples(batch: TokenBatch, layer: int) -> Ids:
    """0 with 1, 2 with 3: by the token id."""
    first = batch.tokens_BS.reshape(-1, 1) % 2 * 2
    return np.concatenate([first, first + 1], 1)


def test_a_forced_pair_is_always_together(tmp_path: Path) -> None:
    model = PlantedModel(_couples, experts=6, topk=2)
    result = result_of(Coactivation(), model, random_sample(tmp_path))
    share = result.arrays["share_LEE"][1]
    assert share[0, 1] == share[1, 0] == share[2, 3] == 1.0
    assert share[0, 2] == share[3, 1] == 0.0
    assert np.isnan(share[4]).all() and np.isnan(np.diag(share)).all()
    # Loads of a quarter each: 4 experts, k = 2, a third of the pairs of an expert by loads alone.
    np.testing.assert_allclose(result.arrays["lift_LEE"][0, 0, 1], 3.0, rtol=0.1)
    np.testing.assert_allclose(result.numbers["strength"], 2 / 3, rtol=0.05)
    assert result.numbers["largest share of a pair"] == 1.0
    assert "redundant" in Coactivation().reading({"m": result})


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (8, 3), (16, 8)])
def test_a_random_router_is_at_chance(experts: int, topk: int, tmp_path: Path) -> None:
    model = PlantedModel(random_rule(experts, topk), experts=experts, topk=topk, layers=range(8))
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=4000))
    chance = (topk - 1) / (experts - 1)
    assert result.numbers["chance for equal loads, (k-1)/(E-1)"] == chance
    np.testing.assert_allclose(np.nanmean(result.arrays["share_LEE"]), chance, rtol=2e-3)
    np.testing.assert_allclose(np.nanmean(result.arrays["lift_LEE"]), 1.0, atol=5e-3)
    np.testing.assert_allclose(
        result.numbers["strength"], result.numbers["strength by chance"], rtol=0.1
    )
    assert (result.arrays["strength_L"] > result.arrays["null_high_L"]).sum() <= 1
    assert "independently" in Coactivation().reading({"m": result})


def test_the_published_count_is_lower_by_half_of_k(tmp_path: Path) -> None:
    """7 of 28 pairs for k = 8, as in OLMoE."""
    model = PlantedModel(random_rule(16, 8), experts=16, topk=8)
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=2000))
    exact, published = (np.nanmean(result.arrays[f"{n}_LEE"]) for n in ("share", "published"))
    np.testing.assert_allclose(exact / published, 4.0, rtol=1e-2)


def test_shares_by_hand(tmp_path: Path) -> None:
    """Four tokens: {0,1,2} ranked 0 1 2, {0,2,1}, {0,1,3}, {3,2,0}."""
    sets = np.array([[0, 1, 2], [0, 2, 1], [0, 1, 3], [3, 2, 0]])
    model = PlantedModel(
        lambda batch, layer: np.tile(sets, (batch.size // 4, 1)), experts=4, topk=3
    )
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=400))
    share, published = result.arrays["share_LEE"][0], result.arrays["published_LEE"][0]
    assert share[0, 1:].tolist() == [0.75, 0.75, 0.5]
    assert share[1, 2] == pytest.approx(2 / 3)
    # Consecutive ranks: 0-1 twice, 1-2 twice, 0-2 twice, 1-3 once, 3-2 once.
    assert published[0, 1:].tolist() == [0.5, 0.5, 0.0]
    assert published[1, 2] == pytest.approx(2 / 3)


def test_one_choice_has_no_pairs(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 1), experts=4, topk=1)
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=400))
    assert "no pairs" in result.notes[0] and result.numbers["strength"] == 0
    assert "one expert" in Coactivation().reading({"m": result})


@pytest.mark.parametrize(("experts", "topk"), [(8, 7), (8, 8), (3, 2), (2, 2)])
def test_no_strength_where_loads_decide_the_pairs(experts: int, topk: int, tmp_path: Path) -> None:
    """One expert is missing, more often the later ones: N_ij = N_i + N_j - T, whatever happens."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        weight_E = np.arange(1, experts + 1)
        missing_T = batch.tokens_BS.reshape(-1) % weight_E.sum()
        last_T = np.searchsorted(weight_E.cumsum(), missing_T, side="right")
        order_TE = (last_T[:, None] + 1 + np.arange(experts)) % experts
        return order_TE[:, :topk]

    model = PlantedModel(rule, experts=experts, topk=topk)
    sample = random_sample(tmp_path, vocab=360, tokens=8000)
    result = result_of(Coactivation(), model, sample)
    pairs, tokens = result.arrays["tokens_LEE"][0], sum(b.size for b in sample.batches())
    loads = pairs.sum(1) / (topk - 1)
    for i in range(experts):
        for j in range(i):
            assert pairs[i, j] == pytest.approx(loads[i] + loads[j] - tokens)
    for name in ("strength", "strength by chance", "p-value of the strength"):
        assert np.isnan(result.numbers[name])
    lift = result.arrays["lift_LEE"]
    assert (lift[~np.isnan(lift)] == 1).all()
    assert "misses at most one" in result.notes[0]
    assert "loads decide" in Coactivation().reading({"m": result})
    assert Coactivation().figures({"m": result})


def test_all_but_two_experts_have_a_strength(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(8, 6), experts=8, topk=6, layers=range(8))
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=4000))
    strength, null = (result.numbers[n] for n in ("strength", "strength by chance"))
    assert null > 0
    np.testing.assert_allclose(strength, null, rtol=0.2)


def test_chance_is_as_exact_as_the_observed_table() -> None:
    """Expert 0 has nearly half of ten million choices, where the iteration is slow."""
    loads = np.array([4.9e6, 2e6, 2e6, 1.1e6])
    expected = independent_pairs(loads, 2)
    null = drawn_strength(expected[None], 10, np.random.default_rng(0))
    # Noise alone: about 1 / sqrt(5e6) for the few pairs.
    assert null.max() < 1e-3


def test_pairs_by_loads_alone() -> None:
    """Equal loads give the constant; any loads give rows that sum to (K - 1) times them."""
    np.testing.assert_allclose(
        independent_pairs(np.full(8, 300), 2), 300 / 7 * (1 - np.eye(8)), rtol=1e-9
    )
    loads = np.array([900, 500, 400, 150, 50])
    pairs = independent_pairs(loads, 2)
    np.testing.assert_allclose(pairs.sum(1), loads, rtol=1e-6)
    np.testing.assert_allclose(pairs, pairs.T)
    # No interaction: odds of two pairs do not depend on the partner.
    np.testing.assert_allclose(pairs[0, 2] * pairs[1, 3], pairs[0, 3] * pairs[1, 2], rtol=1e-6)
    assert not independent_pairs(loads, 1).any()


def test_heat_maps_of_many_experts_show_the_strongest_pairs(tmp_path: Path) -> None:
    model = PlantedModel(_couples, experts=70, topk=2)
    result = result_of(Coactivation(), model, random_sample(tmp_path, tokens=400))
    figures = Coactivation().figures({"m": result})
    assert [figure.key for figure in figures] == ["strength", "share", "published", "lift"]
    panel = figures[1].panels["layer 0"]
    assert len(panel.rows) == 32 and {*panel.rows[:4]} == {"0", "1", "2", "3"}  # type: ignore[union-attr]
