"""Flow between layers and predictability: a fixed successor, independence, tables by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.flow import CrossLayerFlow, strength_of
from megatron_moe.analysis.analyses.predictability import (
    LoadPredictability,
    accuracy,
    information,
)
from megatron_moe.analysis.observation import TokenBatch
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    sample_of,
    token_rule,
)


def test_a_fixed_successor_is_certain(tmp_path: Path) -> None:
    """The expert of layer l is (7 id + l) mod 4, so its number grows by one in each layer."""
    model = PlantedModel(token_rule(4, 2), experts=4, topk=2, layers=range(3))
    sample = random_sample(tmp_path, vocab=40)
    flow, ahead = (result_of(a, model, sample) for a in (CrossLayerFlow(), LoadPredictability()))
    table = flow.arrays["first_MEE"][0]
    np.testing.assert_array_equal(table > 0, np.roll(np.eye(4, dtype=bool), 1, axis=1))
    np.testing.assert_allclose(flow.numbers["strength"], 0.75, rtol=0.01)
    assert flow.tables[1].columns["share"][:4] == [1.0] * 4
    assert ahead.numbers["accuracy (mean over layers)"] == 1.0
    np.testing.assert_allclose(ahead.arrays["information_L"], 1.0, rtol=1e-9)
    np.testing.assert_allclose(ahead.arrays["baseline_L"], 0.25, rtol=0.1)
    assert "ahead" in LoadPredictability().reading({"m": ahead})
    assert "hand tokens on" in CrossLayerFlow().reading({"m": flow})
    # Ranks: slots pair 0 with 0 and 1 with 1 only, both of which move by one; all pairs see more.
    assert (flow.arrays["slots_MEE"][0] > 0).sum() == 4
    assert (flow.arrays["all_MEE"][0] > 0).sum() == 12
    assert flow.arrays["all_MEE"][0].sum() == 2 * flow.arrays["slots_MEE"][0].sum()


def test_independent_layers_are_at_chance(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(6, 2), experts=6, topk=2, layers=range(13))
    sample = random_sample(tmp_path, tokens=6000)
    flow, ahead = (result_of(a, model, sample) for a in (CrossLayerFlow(), LoadPredictability()))
    np.testing.assert_allclose(
        flow.numbers["strength"], flow.numbers["strength by chance"], rtol=0.15
    )
    np.testing.assert_allclose(
        ahead.arrays["accuracy_L"].mean(), ahead.arrays["accuracy_null_L"].mean(), atol=0.01
    )
    np.testing.assert_allclose(
        ahead.arrays["information_L"].mean(), ahead.arrays["information_null_L"].mean(), rtol=0.3
    )
    assert "independently" in CrossLayerFlow().reading({"m": flow})
    assert "does not help" in LoadPredictability().reading({"m": ahead})


def test_measures_by_hand() -> None:
    """Rows 3 1 and 1 3: half of it would have to move; one bit less what a 3:1 choice leaves."""
    table = np.array([[3, 1], [1, 3]])
    assert strength_of(table) == 0.25
    assert accuracy(table) == 0.75
    # The first expert tells the next one for all tokens, the next one the first for 4 of 6.
    assert accuracy(np.array([[2, 0], [0, 1], [3, 0]])) == 1.0
    left = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert information(table) == pytest.approx(1 - left)
    assert information(np.array([[5, 0], [3, 0]])) == 0.0


def test_a_next_layer_with_a_favourite(tmp_path: Path) -> None:
    """Experts 0 to 3 alternate in layer 1, of which all but 3 lead to expert 0 of layer 4."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        first = batch.tokens_BS.reshape(-1, 1) % 4
        return first if layer == 1 else first // 3

    model = PlantedModel(rule, experts=4, topk=1, layers=(1, 4))
    sample = sample_of(tmp_path, {"a": [[i % 4 for i in range(41)]]})
    result = result_of(LoadPredictability(), model, sample)
    assert result.arrays["layers"].tolist() == [4]
    (table,) = result.tables
    assert (table.columns["layer"], table.columns["next_layer"]) == ([1], [4])
    assert result.arrays["accuracy_L"].tolist() == [1.0]
    assert result.arrays["baseline_L"].tolist() == [0.75]
    # The first choice decides the next one, whose entropy is the smaller one.
    np.testing.assert_allclose(result.arrays["information_L"], 1.0)
    (panel,) = (LoadPredictability().figures({"m": result})[0].panels["accuracy"],)
    assert list(panel.series[0].x) == [4]  # type: ignore[union-attr]


def test_one_layer_has_no_flow(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2, layers=(3,))
    sample = random_sample(tmp_path, tokens=400)
    for analysis in (CrossLayerFlow(), LoadPredictability()):
        result = result_of(analysis, model, sample)
        assert result.notes and "one layer" in analysis.reading({"m": result})
        analysis.figures({"m": result})


def test_large_flows_are_drawn(tmp_path: Path) -> None:
    def rule(batch: TokenBatch, layer: int) -> Ids:
        return batch.tokens_BS.reshape(-1, 1) % 20

    model = PlantedModel(rule, experts=20, topk=1)
    result = result_of(CrossLayerFlow(), model, random_sample(tmp_path))
    (panel,) = CrossLayerFlow().figures({"m": result})[0].panels.values()
    assert panel.flows[0].sum() == result.arrays["first_MEE"].sum()  # type: ignore[union-attr]
