"""Load and collapse, standing committee, locality: planted routers, chance, tiny examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.collapse import Collapse, max_violation
from megatron_moe.analysis.analyses.locality import RoutingLocality, hit_rates_by_chance
from megatron_moe.analysis.analyses.standing_committee import (
    StandingCommittee,
    main_experts,
    overlap,
    overlap_by_chance,
    smallest_cover,
)
from megatron_moe.analysis.observation import TokenBatch
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    sample_of,
)


def _fixed(batch: TokenBatch, layer: int) -> Ids:
    return np.tile([2, 5], (batch.size, 1))


def _committee(batch: TokenBatch, layer: int) -> Ids:
    """Expert 0 always; besides it the domain's own expert, or one of four others in turn."""
    other = 3 + np.arange(batch.size) % 4
    own = np.where(np.arange(batch.size) % 3 > 0, 1 + batch.domain, other)
    return np.stack([np.zeros(batch.size, np.int64), own], 1)


def test_a_collapsed_router(tmp_path: Path) -> None:
    """Two of eight experts, with scores of 0.9 * 2/3 + 0.1/8 and 0.9 * 1/3 + 0.1/8."""
    model = PlantedModel(_fixed, experts=8, topk=2)
    result = result_of(Collapse(), model, random_sample(tmp_path, tokens=1000))
    numbers = result.numbers
    assert numbers["dead experts"] == 12 and numbers["dead experts by chance"] < 1e-9
    assert numbers["MaxVio (mean over layers)"] == 3.0
    assert numbers["effective experts (mean over layers)"] == pytest.approx(2.0)
    assert numbers["confidence"] == pytest.approx(0.6 + 0.0125)
    assert numbers["score of all k choices"] == pytest.approx(0.925)
    scores = np.array([0.6125, 0.3125, *[0.0125] * 6])
    expected = -(scores * np.log(scores)).sum() / np.log(8)
    assert numbers["router entropy over log E"] == pytest.approx(expected)
    assert "12 experts are dead" in Collapse().reading({"m": result})


def test_loads_before_and_after_drops(tmp_path: Path) -> None:
    """Second choices find no slot. 16 tokens that choose 2 of 8 at random miss one 0.08 times."""

    def kept(batch: TokenBatch, layer: int) -> np.ndarray:
        return np.tile([True, False], (batch.size, 1))

    model = PlantedModel(_fixed, experts=8, topk=2, kept=kept)
    result = result_of(Collapse(), model, sample_of(tmp_path, {"a": [[1] * 17]}))
    for name, (second, fifth) in {"load": (0.5, 0.5), "first": (1, 0), "kept": (0.5, 0)}.items():
        expected = [0, 0, second, 0, 0, fifth, 0, 0]
        assert result.arrays[f"{name}_LE"].tolist() == [expected] * 2
    loads = result.tables[1].columns
    assert loads["kept"] == [0, 0, 0.5, 0, 0, 0, 0, 0] * 2
    np.testing.assert_allclose(result.arrays["dead_null_L"], 8 * 0.75**16)


def test_a_random_router_shows_no_collapse(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(16, 2), experts=16, topk=2, layers=range(8))
    result = result_of(Collapse(), model, random_sample(tmp_path, tokens=4000), draws=400)
    for name in ("max_violation", "effective"):
        found, null = (result.arrays[f"{name}{s}_L"].mean() for s in ("", "_null"))
        np.testing.assert_allclose(found, null, rtol=0.25 if name == "max_violation" else 2e-3)
    assert result.numbers["dead experts"] == 0
    assert "no sign of collapse" in Collapse().reading({"m": result})
    assert max_violation(np.array([1, 1, 4])) == 1.0
    few = result_of(Collapse(), model, random_sample(tmp_path, tokens=100))
    assert "800 are needed" in few.notes[0]


def test_a_planted_committee(tmp_path: Path) -> None:
    """Expert 0 takes half of all choices by itself, so it is main everywhere and alone."""
    model = PlantedModel(_committee, experts=16, topk=2)
    sample = random_sample(tmp_path, tokens=2000, domains=2)
    result = result_of(StandingCommittee(), model, sample)
    assert result.arrays["committee_L"].tolist() == [1, 1]
    assert result.numbers["choices that the committee takes"] == 0.5
    assert result.numbers["overlap of domains"] == 1.0
    assert result.numbers["overlap of domains by chance"] < 0.15
    assert result.numbers["experts of the committee by chance"] == 16 / 16**2
    assert result.numbers["experts that are main in one domain"] == 0
    assert result.numbers["experts that cover 90% of tokens"] == 1
    assert "standing committee serves" in StandingCommittee().reading({"m": result})


def test_even_loads_are_no_committee(tmp_path: Path) -> None:
    """Four experts take 60% of the choices of both domains, six of ten the rest."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        place = np.arange(batch.size)
        return np.where(place % 5 < 3, place % 4, 4 + place % 6)[:, None]

    sample = random_sample(tmp_path, tokens=2000, domains=2)
    result = result_of(StandingCommittee(), PlantedModel(rule, experts=10, topk=1), sample)
    assert result.numbers["overlap of domains"] == 1.0
    assert "too even" in StandingCommittee().reading({"m": result})


def test_domain_experts_are_no_committee(tmp_path: Path) -> None:
    def rule(batch: TokenBatch, layer: int) -> Ids:
        return 4 * batch.domain + (np.arange(batch.size)[:, None] + np.arange(2)) % 4

    sample = random_sample(tmp_path, tokens=2000, domains=2)
    result = result_of(StandingCommittee(), PlantedModel(rule, experts=16, topk=2), sample)
    assert result.numbers["experts of the committee (mean over layers)"] == 0
    assert result.numbers["experts that are main in one domain"] >= 4
    assert "experts of their own" in StandingCommittee().reading({"m": result})


def test_a_random_router_has_no_committee(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(16, 2), experts=16, topk=2, layers=range(10))
    result = result_of(StandingCommittee(), model, random_sample(tmp_path, tokens=4000, domains=2))
    numbers = result.numbers
    for name, tolerance in (("Gini of the loads", 0.2), ("overlap of domains", 0.3)):
        np.testing.assert_allclose(numbers[name], numbers[f"{name} by chance"], rtol=tolerance)
    np.testing.assert_allclose(
        numbers["experts of the committee (mean over layers)"],
        numbers["experts of the committee by chance"],
        rtol=0.3,
    )
    assert "matter of noise" in StandingCommittee().reading({"m": result})
    alone = result_of(StandingCommittee(), model, random_sample(tmp_path, tokens=400))
    assert alone.notes and "no committee" in StandingCommittee().reading({"m": alone})


def test_committee_parts_by_hand() -> None:
    """Half of 10: 4 alone is not enough, 4 + 3 is. Half of 8: 4 is."""
    count = np.array([[[1, 4, 2, 3], [4, 1, 1, 2]]])
    assert main_experts(count)[0].tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]
    members = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], bool)
    assert overlap(members) == pytest.approx(1 / 3)
    # Single experts of four agree in one of four cases.
    rng = np.random.default_rng(0)
    assert overlap_by_chance(np.array([1, 1]), 4, 4000, rng) == pytest.approx(0.25, abs=0.03)
    pool = np.array([[0, 1], [0, 2], [0, 3], [3, 4], [4, 5]])
    assert smallest_cover(pool, 6, 0.6) == 1
    assert smallest_cover(pool, 6, 0.9) == 2


def test_runs_of_tokens_are_local(tmp_path: Path) -> None:
    """The experts change every 16 positions; a cache of k gets every choice of a segment."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        block = np.arange(batch.size) // 16
        return (block[:, None] * 5 + np.arange(2)) % 16

    sample = random_sample(tmp_path, tokens=6400, seq_length=128)
    result = result_of(RoutingLocality(), PlantedModel(rule, experts=16, topk=2), sample)
    by_distance = result.arrays["overlap_LJ"][0]
    assert by_distance[0] > 0.9 > by_distance[3] > by_distance[4]
    numbers = result.numbers
    assert numbers["hit rate of the best k experts for 4 tokens"] == 1.0
    assert numbers["hit rate of the best k experts for 16 tokens"] == 1.0
    assert numbers["hit rate of the best k experts for 64 tokens"] < 0.5
    assert numbers["hit rate of the best k experts for 16 tokens, by chance"] < 0.5
    assert "recently used experts gains" in RoutingLocality().reading({"m": result})


def test_documents_explain_overlap_that_is_not_local(tmp_path: Path) -> None:
    """Each document has four experts of its own; within it choices are random."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        own = batch.documents_BS.reshape(-1, 1) * 4
        return (own + random_rule(4, 2)(batch, layer)) % 64

    sample = random_sample(tmp_path, tokens=6000, seq_length=128)
    result = result_of(RoutingLocality(), PlantedModel(rule, experts=64, topk=2), sample)
    np.testing.assert_allclose(result.arrays["document_L"], 0.5, atol=0.02)
    np.testing.assert_allclose(result.arrays["neighbours_L"], 0.5, atol=0.03)
    assert "what a document is about" in RoutingLocality().reading({"m": result})


def test_a_random_router_has_no_locality(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(8, 2), experts=8, topk=2, layers=range(4))
    sample = random_sample(tmp_path, tokens=8000, seq_length=128)
    result = result_of(RoutingLocality(), model, sample)
    np.testing.assert_allclose(result.arrays["overlap_LJ"].mean(0)[:5], 0.25, atol=0.01)
    np.testing.assert_allclose(result.arrays["null_L"], 0.25, atol=0.002)
    np.testing.assert_allclose(result.arrays["document_L"], 0.25, atol=0.01)
    hits, null = result.arrays["hits_LQC"].mean(0), result.arrays["hits_null_LQC"].mean(0)
    np.testing.assert_allclose(hits, null, atol=0.02)
    assert "gains nothing" in RoutingLocality().reading({"m": result})


def test_chance_of_segments_by_hand() -> None:
    """One token: k of k choices are its own. Two of two fair coins: 3/4 at the best one."""
    rng = np.random.default_rng(0)
    assert hit_rates_by_chance(np.array([[0, 1], [2, 3]]), 4, 1, [2, 4], 50, rng) == [1.0, 1.0]
    (rate,) = hit_rates_by_chance(np.array([[0], [1]]), 2, 2, [1], 4000, rng)
    assert rate == pytest.approx(0.75, abs=0.02)


def test_short_rows_leave_gaps(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2)
    result = result_of(RoutingLocality(), model, sample_of(tmp_path, {"a": [[1] * 65]}))
    assert np.isnan(result.arrays["overlap_LJ"][:, 3:]).all()
    assert np.isnan(result.arrays["hits_LQC"][:, 1:]).all() and result.notes


def test_figures(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2)
    sample = random_sample(tmp_path, tokens=800, domains=2)
    for analysis in (Collapse(), StandingCommittee(), RoutingLocality()):
        result = result_of(analysis, model, sample)
        keys = [f.key for f in analysis.figures({"m": result, "n": result})]
        assert len(keys) == len(set(keys)) >= 3
