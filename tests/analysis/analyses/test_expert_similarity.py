"""The analysis on planted models, against loops over pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.expert_similarity import ExpertSimilarity
from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import ExpertWeights
from megatron_moe.convert.model import of_tensor
from megatron_moe.errors import UsageError
from tests.analysis.weights.toy import (
    ToyModel,
    near,
    random_expert,
    random_model,
    reordered,
    stored,
    upcycled_model,
)

RANDOM_ORDER = "mean cosine with neurons in random order"


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / a.norm() / b.norm())


def test_the_definition(tmp_path: Path) -> None:
    model = random_model(layers=2, experts=3, width=6, hidden=8)
    found = stored(ExpertSimilarity(), model, tmp_path)
    assert found.arrays["projections"].tolist() == ["up", "gate", "down"]
    for place, layer in enumerate((1, 3)):
        experts = model.weights(layer).experts
        for p, name in enumerate(("up", "gate", "down")):
            matrices = [getattr(each, name).whole() for each in experts]
            expected = [[_cosine(a, b) for b in matrices] for a in matrices]
            np.testing.assert_allclose(found.arrays["cosine_LPRR"][place, p], expected, atol=1e-6)
            pairs = [expected[i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
            row = place * 3 + p
            assert found.tables[0].rows[row][:3] == (
                layer,
                name,
                pytest.approx(np.mean(pairs), abs=1e-6),
            )
            assert found.tables[0].rows[row][3] == pytest.approx(max(pairs), abs=1e-6)


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    model = random_model(layers=2, experts=8, width=64, hidden=64)
    found = stored(ExpertSimilarity(), model, tmp_path)
    deviation = found.numbers["standard deviation for random matrices"]
    assert deviation == 1 / 64
    cosine = found.arrays["cosine_LPRR"]
    pairs = cosine[(..., *np.triu_indices(8, 1))]
    assert pairs.std() == pytest.approx(deviation, rel=0.2)
    assert abs(found.numbers["mean cosine"]) < 3 * deviation / math.sqrt(pairs.size)
    expected = found.numbers["expected largest for random matrices"]
    assert found.numbers["largest cosine of two experts"] == pytest.approx(expected, rel=0.3)
    assert "as different as random ones" in ExpertSimilarity().reading({"a": found})


def test_upcycled_experts(tmp_path: Path) -> None:
    found = stored(ExpertSimilarity(), upcycled_model(noise=0.1), tmp_path)
    assert found.numbers["mean cosine"] == pytest.approx(1 / 1.01, abs=0.01)
    assert abs(found.numbers[RANDOM_ORDER]) < 0.2
    assert "in the same place" in ExpertSimilarity().reading({"a": found})


def test_a_permuted_copy_hides(tmp_path: Path) -> None:
    """And the formula for random orders is the mean over them."""
    generator = torch.Generator().manual_seed(0)
    first = {n: w + 0.4 for n, w in random_expert(40, 12, generator).items()}
    orders = [torch.randperm(40, generator=generator) for _ in range(200)]
    copies = [[first, reordered(first, order)] for order in orders]
    found = stored(ExpertSimilarity(), ToyModel([torch.randn(2, 12)], copies[:1]), tmp_path)
    drawn = np.mean([_cosine(a["up"], b["up"]) for a, b in copies])
    assert found.arrays["random_order_LP"][0, 0] == pytest.approx(drawn, abs=0.01)
    assert found.numbers["mean cosine, up"] < 0.3


def test_rows_of_other_networks(tmp_path: Path) -> None:
    """Experts that began as the dense layer before them, beside a shared expert of noise."""
    generator = torch.Generator().manual_seed(0)
    dense, shared = random_expert(20, 16, generator), random_expert(20, 16, generator)
    experts = [near(dense, 0.5, generator) for _ in range(3)]
    model = ToyModel([torch.randn(3, 16)], [experts], [shared], {0: dense})
    found = stored(ExpertSimilarity(), model, tmp_path)
    assert found.arrays["names_LR"].tolist() == [["0", "1", "2", "shared", "dense 0"]]
    assert found.arrays["cosine_LPRR"].shape == (1, 3, 5, 5)
    near_dense = found.numbers["mean cosine with the nearest dense layer"]
    assert near_dense == pytest.approx(1 / math.sqrt(1.25), abs=0.03)
    assert abs(found.numbers["mean cosine with the shared expert"]) < 0.1
    assert [row[2] for row in found.tables[1].rows] == ["shared"] * 3 + ["dense 0"] * 3
    # Other networks do not count as experts.
    assert found.numbers["mean cosine"] == pytest.approx(1 / 1.25, abs=0.03)


def test_a_dense_model_beside(tmp_path: Path) -> None:
    """The experts began as copies of its layers; each layer is compared with the same one there."""
    generator = torch.Generator().manual_seed(0)
    layers = [random_expert(20, 16, generator) for _ in range(4)]
    experts = [[near(layers[i], 0.5, generator) for _ in range(3)] for i in (1, 3)]
    model = ToyModel([torch.randn(3, 16)] * 2, experts)
    weights = {
        i: ExpertWeights(**{n: of_tensor(w) for n, w in each.items()})
        for i, each in enumerate(layers)
    }
    dense = DenseModel(
        label="base", path=Path("base"), layers=weights, hidden_size=16, width=20, identity=""
    )
    found = stored(ExpertSimilarity(), model, tmp_path, beside=dense)
    assert found.arrays["names_LR"].tolist() == [[*"012", "base 1"], [*"012", "base 3"]]
    same = found.numbers["mean cosine with a layer of the dense model"]
    assert same == pytest.approx(1 / math.sqrt(1.25), abs=0.03)
    with pytest.raises(UsageError, match=r"hidden size of base must be .*\(16\) \(got 8\)"):
        stored(ExpertSimilarity(), model, tmp_path, beside=replace(dense, hidden_size=8))


def test_a_dense_layer_of_another_width_is_named(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(6, 8, generator) for _ in range(3)]
    model = ToyModel([torch.randn(3, 8)], [experts], dense={0: random_expert(9, 8, generator)})
    found = stored(ExpertSimilarity(), model, tmp_path)
    assert found.notes == [
        "Dense layers are 9 neurons wide and experts 6: only their average neurons are compared."
    ]
    assert np.isnan(found.arrays["cosine_LPRR"][0, :, 3, :3]).all()
    assert found.tables[1].rows == []


def test_the_trend_over_depth(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for noise in (0.5, 0.8, 1.2, 1.8, 2.5, 0.6):
        start = random_expert(20, 16, generator)
        layers.append([near(start, noise, generator) for _ in range(3)])
    found = stored(ExpertSimilarity(), ToyModel([torch.randn(3, 16)] * 6, layers), tmp_path)
    text = ExpertSimilarity().reading({"a": found})
    assert "falls with depth (rank correlation -1.00), as in the paper" in text
    assert "the last layer is above the one before it, as there" in text
    turned = ToyModel([torch.randn(3, 16)] * 6, [*layers[4::-1], layers[5]])
    text = ExpertSimilarity().reading({"a": stored(ExpertSimilarity(), turned, tmp_path)})
    assert "rises with depth" in text and "unlike in the paper" in text


def test_titles_and_panels_are_not_those_of_a_series(tmp_path: Path) -> None:
    result = stored(ExpertSimilarity(), random_model(layers=2, experts=3), tmp_path)
    first, *_ = ExpertSimilarity().figures({"a model": result})
    assert "a model" not in first.title
    assert list(first.panels) == ["up projection", "gate projection", "down projection"]
