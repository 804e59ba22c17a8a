"""The analysis on planted models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.neuron_averages import NeuronAverages
from tests.analysis.weights.toy import ToyModel, random_expert, random_model, reordered, stored


def test_the_definition(tmp_path: Path) -> None:
    model = random_model(layers=2, experts=3, width=6, hidden=8)
    found = stored(NeuronAverages(), model, tmp_path)
    for place, layer in enumerate((1, 3)):
        experts = model.weights(layer).experts
        for p, name in enumerate(("up", "gate", "down")):
            # Neurons are the rows of up and gate [F, H], and the columns of down [H, F].
            axis = 1 if name == "down" else 0
            means = [getattr(each, name).whole().double().mean(axis) for each in experts]
            expected = [[float(a @ b / a.norm() / b.norm()) for b in means] for a in means]
            np.testing.assert_allclose(found.arrays["cosine_LPRR"][place, p], expected, atol=1e-6)


def test_the_order_of_neurons_does_not_matter(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first = random_expert(40, 12, generator)
    second = reordered(first, torch.randperm(40, generator=generator))
    model = ToyModel([torch.randn(2, 12)], [[first, second]])
    found = stored(NeuronAverages(), model, tmp_path)
    assert found.numbers["largest cosine of two experts"] == pytest.approx(1, abs=1e-6)
    assert "lean in the same directions" in NeuronAverages().reading({"a": found})


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    found = stored(NeuronAverages(), random_model(layers=4, experts=8, hidden=64), tmp_path)
    assert found.numbers["standard deviation for random vectors"] == 1 / 8
    pairs = found.arrays["cosine_LPRR"][(..., *np.triu_indices(8, 1))]
    assert pairs.std() == pytest.approx(1 / 8, rel=0.2)
    assert "as different as random vectors" in NeuronAverages().reading({"a": found})


def test_networks_of_any_width_are_compared(tmp_path: Path) -> None:
    """A dense layer whose neurons are those of the experts, side by side."""
    generator = torch.Generator().manual_seed(0)
    first = random_expert(6, 8, generator)
    wide = {n: torch.cat([w, w], dim=1 if n == "down" else 0) for n, w in first.items()}
    model = ToyModel(
        [torch.randn(2, 8)], [[first, random_expert(6, 8, generator)]], dense={0: wide}
    )
    found = stored(NeuronAverages(), model, tmp_path)
    assert found.arrays["names_LR"].tolist() == [["0", "1", "dense 0"]]
    np.testing.assert_allclose(found.arrays["cosine_LPRR"][0, :, 2, 0], 1, atol=1e-6)
