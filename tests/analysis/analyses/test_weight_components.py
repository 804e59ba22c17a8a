"""The analysis on planted models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.weight_components import WeightComponents
from tests.analysis.weights.toy import ToyModel, near, random_expert, random_model, stored

FIRST = "mean share of the first component of matrices"
BETWEEN = "mean share of neurons' variance between experts"


def test_the_definition(tmp_path: Path) -> None:
    model = random_model(layers=1, experts=5, width=6, hidden=8)
    found = stored(WeightComponents(), model, tmp_path)
    for p, name in enumerate(("up", "gate", "down")):
        flat = torch.stack(
            [getattr(e, name).whole().flatten() for e in model.weights(1).experts]
        ).double()
        left, value, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        expected = (left[:, :2] * value[:2]).abs().numpy()
        place = np.abs(found.arrays["matrices_LPEC"][0, p])
        np.testing.assert_allclose(place, expected, atol=1e-5)
        share = value[0] ** 2 / (value**2).sum()
        assert found.tables[0].rows[p][2] == pytest.approx(float(share), abs=1e-6)


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    model = random_model(layers=2, experts=8, width=128, hidden=64)
    found = stored(WeightComponents(), model, tmp_path)
    assert found.numbers["share for random matrices"] == pytest.approx(1 / 7)
    assert found.numbers[FIRST] == pytest.approx(1 / 7, rel=0.1)
    chance = found.numbers["share for random neurons"]
    assert found.numbers["mean share of the first component of neurons"] == pytest.approx(
        chance, rel=0.1
    )
    expected = found.numbers["share between experts for random neurons"]
    assert found.numbers[BETWEEN] == pytest.approx(expected, abs=0.01)
    text = WeightComponents().reading({"a": found})
    assert "form no groups" in text and "are mixed" in text


def test_two_groups_of_experts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [random_expert(20, 16, generator) for _ in range(2)]
    experts = [near(starts[e % 2], 0.2, generator) for e in range(6)]
    found = stored(WeightComponents(), ToyModel([torch.randn(6, 16)], [experts]), tmp_path)
    assert found.numbers[FIRST] > 0.9
    place = found.arrays["matrices_LPEC"][0, 0, :, 0]
    assert (np.sign(place[::2]) == np.sign(place[0])).all()
    assert (np.sign(place[1::2]) == -np.sign(place[0])).all()
    assert "times as much" in WeightComponents().reading({"a": found})


def test_neurons_that_cluster_by_expert(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [
        {
            n: w + 4 * torch.randn(16, 1, generator=generator) if n == "down" else w
            for n, w in random_expert(20, 16, generator).items()
        }
        for _ in range(3)
    ]
    found = stored(WeightComponents(), ToyModel([torch.randn(3, 16)], [experts]), tmp_path)
    between = [row[-1] for row in found.tables[0].rows]
    assert between[2] > 0.9 and max(between[:2]) < 0.2
    assert "20 of 20 of each expert" in found.notes[0]


def test_identical_experts_are_said_to_be(tmp_path: Path) -> None:
    one = random_expert(20, 16, torch.Generator().manual_seed(0))
    found = stored(WeightComponents(), ToyModel([torch.randn(6, 16)], [[one] * 6]), tmp_path)
    assert "experts are identical" in WeightComponents().reading({"a": found})
