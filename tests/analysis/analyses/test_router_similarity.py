"""The analysis on planted models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.router_similarity import RouterSimilarity
from tests.analysis.weights.toy import ToyModel, random_expert, random_model, stored


def _tied(layers: int, experts: int = 8) -> ToyModel:
    """The average neuron of each gate projection is near the expert's row in the router."""
    generator = torch.Generator().manual_seed(0)
    routers, all_experts = [], []
    for _ in range(layers):
        router = torch.randn(experts, 16, generator=generator)
        own = [dict(random_expert(40, 16, generator)) for _ in range(experts)]
        for row, each in zip(router, own, strict=True):
            each["gate"] = each["gate"] + row
        routers.append(router)
        all_experts.append(own)
    return ToyModel(routers, all_experts)


def test_the_definition(tmp_path: Path) -> None:
    model = random_model(layers=2, experts=5, width=6, hidden=8)
    found = stored(RouterSimilarity(), model, tmp_path)
    for place, layer in enumerate((1, 3)):
        weights = model.weights(layer)
        router = weights.router.whole().double().numpy()
        for p, name in enumerate(("up", "gate", "down")):
            axis = 1 if name == "down" else 0
            means = [getattr(e, name).whole().double().mean(axis).numpy() for e in weights.experts]
            x, y = [], []
            for i in range(5):
                for j in range(i):
                    for values, rows in ((x, router), (y, means)):
                        norm = np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])
                        values.append(rows[i] @ rows[j] / norm)
            expected = np.corrcoef(x, y)[0, 1]
            assert found.arrays["r_LP"][place, p] == pytest.approx(expected, abs=1e-6)
            assert found.tables[0].rows[place * 3 + p][2] == pytest.approx(expected, abs=1e-6)


def test_a_router_that_goes_with_the_gates(tmp_path: Path) -> None:
    found = stored(RouterSimilarity(), _tied(4), tmp_path)
    assert found.numbers["mean r^2, gate"] > 0.8
    assert found.numbers["p-value of all layers, gate"] < 1e-3
    assert found.numbers["p-value of all layers, up"] > 0.01
    assert found.numbers["mean r^2 by chance"] == pytest.approx(1 / 27, abs=0.02)
    assert "most of all in the gate projection" in RouterSimilarity().reading({"a": found})


def test_a_correlation_below_zero_is_not_that_of_the_paper(tmp_path: Path) -> None:
    found = stored(RouterSimilarity(), _tied(4), tmp_path)
    turned = replace(found, arrays={**found.arrays, "r_LP": -found.arrays["r_LP"]})
    assert "have similar neurons" in RouterSimilarity().reading({"a": found})
    text = RouterSimilarity().reading({"a": turned})
    assert "have different neurons" in text and "unlike in the paper" in text


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    found = stored(RouterSimilarity(), random_model(layers=20, experts=8), tmp_path, draws=99)
    p = np.array([row[4] for row in found.tables[0].rows])
    assert found.tables[0].columns.keys() >= {"r", "r_squared", "p_value"}
    assert p.mean() == pytest.approx(0.5, abs=0.15)
    assert (p <= 0.05).mean() < 0.15
    squares = found.arrays["r_LP"] ** 2
    assert squares.mean() == pytest.approx(found.numbers["mean r^2 by chance"], rel=0.5)
    assert min(found.numbers[f"p-value of all layers, {n}"] for n in ("up", "gate", "down")) > 0.05
    assert "do not go with" in RouterSimilarity().reading({"a": found})


def test_few_experts(tmp_path: Path) -> None:
    for experts, said in ((2, "a correlation needs 3"), (3, "have only 6 orders")):
        found = stored(RouterSimilarity(), random_model(experts=experts), tmp_path / str(experts))
        assert any(said in note for note in found.notes)
