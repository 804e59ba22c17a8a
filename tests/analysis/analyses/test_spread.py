"""Spread over experts by position and token id: fixed experts, chance, tiny tables; drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses import position_spread
from megatron_moe.analysis.analyses.drops import Drops
from megatron_moe.analysis.analyses.position_spread import PositionSpread
from megatron_moe.analysis.analyses.token_spread import TokenSpread
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.spread import beyond_chance, fixed_experts, spread, spread_by_chance
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    sample_of,
    token_rule,
)


def _by_position(batch: TokenBatch, layer: int) -> Ids:
    position = np.tile(np.arange(batch.tokens_BS.shape[1]), len(batch.tokens_BS))
    return (position[:, None] * 2 + np.arange(2)) % 32


def test_two_fixed_experts_of_32_have_a_spread_of_0_121(tmp_path: Path) -> None:
    assert fixed_experts(2, 32) == pytest.approx(0.121, abs=5e-4)
    sample = random_sample(tmp_path, tokens=3000, vocab=12)
    model = PlantedModel(_by_position, experts=32, topk=2)
    result = result_of(PositionSpread(), model, sample)
    np.testing.assert_allclose(result.arrays["spread_LP"], fixed_experts(2, 32), rtol=1e-12)
    assert result.numbers["spread beyond chance"] > 0.1
    assert "Unlike in OpenMoE" in PositionSpread().reading({"m": result})
    model = PlantedModel(token_rule(32, 2), experts=32, topk=2)
    by_id = result_of(TokenSpread(), model, sample)
    assert by_id.numbers["least occurrences"] == 129 and by_id.numbers["ids"] == 12
    np.testing.assert_allclose(by_id.arrays["spread_LV"], fixed_experts(2, 32), rtol=1e-12)
    assert "As in OpenMoE" in TokenSpread().reading({"m": by_id})


def test_a_random_router_is_at_chance(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=6000, vocab=20)
    model = PlantedModel(random_rule(8, 2), experts=8, topk=2, layers=range(4))
    for analysis in (PositionSpread(), TokenSpread()):
        result = result_of(analysis, model, sample)
        found = next(v for k, v in result.arrays.items() if k.startswith("spread_"))
        null = next(v for k, v in result.arrays.items() if k.startswith("null_"))
        np.testing.assert_allclose((found**2).mean(), (null**2).mean(), rtol=0.15)
        assert result.numbers["spread beyond chance"] < 0.1 * fixed_experts(2, 8)
    assert "do not specialize in positions" in PositionSpread().reading(
        {"m": result_of(PositionSpread(), model, sample)}
    )
    assert "hardly matter" in TokenSpread().reading({"m": result})


def test_unequal_loads_are_no_preference(tmp_path: Path) -> None:
    """Nine of ten tokens choose expert 0, whatever their id and position."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        draw = np.random.default_rng(batch.number).random((batch.size, 1))
        return (draw > 0.9).astype(np.int64)

    sample = random_sample(tmp_path, tokens=6000, vocab=20)
    model = PlantedModel(rule, experts=4, topk=1)
    for analysis in (PositionSpread(), TokenSpread()):
        result = result_of(analysis, model, sample)
        assert result.numbers["mean spread"] > 0.3
        assert result.numbers["spread beyond chance"] < 0.04


def test_spread_by_hand() -> None:
    """Shares 1/2, 1/2, 0, 0; and uniform; and an id that did not occur."""
    found = spread(np.array([[2, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]))
    assert found[:2].tolist() == [0.25, 0.0] and np.isnan(found[2])
    assert beyond_chance(np.array([0.5, np.nan]), np.array([0.3, np.nan])) == pytest.approx(0.4)
    assert beyond_chance(np.array([0.2]), np.array([0.3])) == 0.0


def test_chance_is_that_of_groups_drawn_without_replacement() -> None:
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.zeros(50, int), rng.integers(1, 5, 150)])
    other = (ids + 1 + rng.integers(0, 4, 200)) % 5
    chosen = np.stack([ids, other], 1)
    load = np.bincount(chosen.ravel(), minlength=5)
    squares = []
    for _ in range(4000):
        group = chosen[rng.permutation(200)[:80]]
        share = np.bincount(group.ravel(), minlength=5) / 160
        squares.append(((share - 0.2) ** 2).mean())
    np.testing.assert_allclose(
        spread_by_chance(load, 200, 2, np.array([80]))[0], np.sqrt(np.mean(squares)), rtol=0.01
    )


def test_top_tokens_of_an_expert(tmp_path: Path) -> None:
    """Expert 0 gets id 4 nine times and id 6 three times; expert 1 the rest."""
    texts = {"a": [[4] * 9 + [6] * 3 + [5] * 4 + [9]]}

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return batch.tokens_BS.reshape(-1, 1) % 2

    result = result_of(
        TokenSpread(), PlantedModel(rule, experts=3, topk=1), sample_of(tmp_path, texts)
    )
    rows = [row for row in result.tables[1].rows if row[0] == 0]
    assert rows == [
        (0, 0, 1, 4, "<4>", 9, 0.75, 1.0),
        (0, 0, 2, 6, "<6>", 3, 0.25, 1.0),
        (0, 1, 1, 5, "<5>", 4, 1.0, 1.0),
    ]
    assert "No id occurs 16 times" in result.notes[0]
    assert "often enough" in TokenSpread().reading({"m": result})
    assert len(TokenSpread().figures({"m": result})) == 1


def test_rare_ids_lower_the_minimum_with_a_note(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=1000, vocab=20)
    result = result_of(TokenSpread(), PlantedModel(random_rule(4, 1), experts=4, topk=1), sample)
    assert result.numbers["least occurrences"] == 32
    assert "paper's minimum" in result.notes[0]


def test_drops_towards_the_end(tmp_path: Path) -> None:
    """Positions 6 and 7 of 8 lose their second choice, position 7 both, in domain 1 only."""

    def kept(batch: TokenBatch, layer: int) -> np.ndarray:
        position = np.tile(np.arange(8), len(batch.tokens_BS))[:, None]
        lost = (position >= np.array([[7, 6]])) & (batch.domain == 1)
        return ~lost

    sample = random_sample(tmp_path, tokens=800, domains=2)
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2, kept=kept)
    result = result_of(Drops(), model, sample)
    assert result.arrays["any_LDQ"][0].tolist() == [[0] * 8, [0] * 6 + [1, 1]]
    assert result.arrays["all_LDQ"][1].tolist() == [[0] * 8, [0] * 7 + [1]]
    assert result.arrays["by_rank_LDK"][0].tolist() == [[0, 0], [1 / 8, 2 / 8]]
    assert result.numbers["tokens that lost a choice"] == pytest.approx(1 / 8)
    assert result.numbers["lost a choice in the last quarter of the row"] == 0.5
    assert result.numbers["lost a choice in the first quarter of the row"] == 0
    assert "as in OpenMoE" in Drops().reading({"m": result})


def test_drops_of_neighbouring_positions_are_shares_of_their_tokens(tmp_path: Path) -> None:
    """64 positions in 32 groups of two, of which every second position loses its choice."""

    def kept(batch: TokenBatch, layer: int) -> np.ndarray:
        return np.tile(np.arange(64) % 2 == 0, len(batch.tokens_BS))[:, None]

    sample = random_sample(tmp_path, tokens=1000, seq_length=64)
    model = PlantedModel(random_rule(4, 1), experts=4, topk=1, kept=kept)
    result = result_of(Drops(), model, sample)
    assert result.arrays["any_LDQ"].shape == (2, 1, 32)
    assert (result.arrays["any_LDQ"] == 0.5).all() and (result.arrays["all_LDQ"] == 0.5).all()
    assert result.arrays["positions"].tolist() == [2 * group + 0.5 for group in range(32)]


def test_shares_of_neighbouring_positions_are_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Position p chooses experts 2 p and 2 p + 1; four groups of two positions."""
    monkeypatch.setattr(position_spread, "SHOWN", 4)
    model = PlantedModel(_by_position, experts=32, topk=2)
    result = result_of(PositionSpread(), model, random_sample(tmp_path, tokens=400))
    share_QE = result.arrays["share_LQE"][0]
    for group in range(4):
        assert share_QE[group].tolist() == [0.25 * (e // 4 == group) for e in range(32)]
    assert result.arrays["shown_Q"].tolist() == [0, 2, 4, 6]


def test_drops_at_any_position_are_no_trend(tmp_path: Path) -> None:
    def kept(batch: TokenBatch, layer: int) -> np.ndarray:
        return np.random.default_rng([layer, batch.number]).random((batch.size, 2)) > 0.1

    model = PlantedModel(random_rule(4, 2), experts=4, topk=2, kept=kept)
    result = result_of(Drops(), model, random_sample(tmp_path))
    assert abs(result.numbers["z-score of the difference"]) < 3
    assert "little difference" in Drops().reading({"m": result})
    without = result_of(
        Drops(), PlantedModel(random_rule(4, 2), experts=4, topk=2), random_sample(tmp_path)
    )
    assert without.notes and "no choice was dropped" in Drops().reading({"m": without})


def test_figures(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2)
    sample = random_sample(tmp_path, tokens=800)
    for analysis in (PositionSpread(), TokenSpread(), Drops()):
        result = result_of(analysis, model, sample)
        assert analysis.figures({"m": result}) and analysis.figures({"m": result, "n": result})
