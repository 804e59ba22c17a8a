"""Norms and effective ranks on planted models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_moe.analysis.analyses.weight_norms import EXPERT_SPREAD, ROUTER_SPREAD, WeightNorms
from tests.analysis.weights.toy import ToyModel, random_expert, random_model, stored, upcycled_model


def test_the_definition(tmp_path: Path) -> None:
    model = random_model(layers=1, experts=3, width=6, hidden=8)
    found = stored(WeightNorms(), model, tmp_path)
    weights = model.weights(1)
    rows = {(row[1], row[2]): row[3] for row in found.tables[1].rows}
    assert len(rows) == 4 * 3
    for e, expert in enumerate(weights.experts):
        for name in ("up", "gate", "down"):
            size = getattr(expert, name).whole().square().mean().sqrt()
            assert rows[name, e] == pytest.approx(float(size), abs=1e-5)
        assert rows["router", e] == pytest.approx(float(weights.router.whole()[e].norm()), abs=1e-5)


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    found = stored(WeightNorms(), random_model(layers=2, experts=8, width=64, hidden=64), tmp_path)
    for name in ("up", "gate", "down"):
        chance = found.numbers["effective rank of random experts"]
        assert found.numbers[f"effective rank, {name}"] == pytest.approx(chance, rel=0.01)
    chance = found.numbers["effective rank of a random router"]
    assert chance == pytest.approx(8 * math.exp(-8 / 128))
    assert found.numbers["effective rank, router"] == pytest.approx(chance, rel=0.05)
    assert "no sign of collapse" in WeightNorms().reading({"a": found})


def test_collapsed_experts(tmp_path: Path) -> None:
    found = stored(WeightNorms(), upcycled_model(noise=0.05), tmp_path)
    assert found.numbers["effective rank, up"] < 1.1
    assert found.numbers["effective rank, router"] > 3
    assert "have collapsed" in WeightNorms().reading({"a": found})


def test_an_expert_that_grew(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(20, 16, generator) for _ in range(4)]
    experts[2] = {n: 3 * w for n, w in experts[2].items()}
    router = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator))
    found = stored(WeightNorms(), ToyModel([router], [experts]), tmp_path)
    # Sizes 1, 1, 3, 1: mean 1.5, standard deviation sqrt(3) / 2.
    assert found.numbers[EXPERT_SPREAD] == pytest.approx(math.sqrt(3) / 3, rel=0.1)
    assert found.numbers[ROUTER_SPREAD] == pytest.approx(0, abs=1e-6)
    # The effective rank does not depend on norms.
    assert found.numbers["effective rank, up"] == pytest.approx(4, abs=0.1)
