"""The analysis on planted models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses import neuron_matching
from megatron_moe.analysis.analyses.neuron_matching import LARGEST, NeuronMatching
from tests.analysis.weights.toy import (
    ToyModel,
    near,
    random_expert,
    random_model,
    reordered,
    stored,
    upcycled_model,
)

KINDS = ["up", "gate", "down", "joint"]


def _permuted_copies(experts: int = 3, noise: float = 0.0) -> ToyModel:
    generator = torch.Generator().manual_seed(0)
    first = random_expert(60, 16, generator)
    rest = [
        near(reordered(first, torch.randperm(60, generator=generator)), noise, generator)
        for _ in range(experts - 1)
    ]
    return ToyModel([torch.randn(experts, 16)], [[first, *rest]])


def test_permuted_copies(tmp_path: Path) -> None:
    found = stored(NeuronMatching(), _permuted_copies(), tmp_path)
    assert found.arrays["kinds"].tolist() == KINDS
    for kind in KINDS:
        assert found.numbers[f"mean cosine after matching, {kind}"] == pytest.approx(1, abs=1e-5)
        assert abs(found.numbers[f"mean cosine before matching, {kind}"]) < 0.1
        deviation = found.numbers["standard deviation of tau for random orders"]
        assert abs(found.numbers[f"mean Kendall's tau, {kind}"]) < 3 * deviation
    text = NeuronMatching().reading({"a": found})
    assert "share neurons that lie in random order" in text and "same up to order" in text


def test_upcycled_experts_keep_the_order(tmp_path: Path) -> None:
    found = stored(NeuronMatching(), upcycled_model(width=40, noise=0.3), tmp_path)
    assert found.numbers["mean Kendall's tau, joint"] == 1
    before = found.numbers["mean cosine before matching, joint"]
    assert (
        before
        == found.numbers["mean cosine after matching, joint"]
        == pytest.approx(0.92, abs=0.02)
    )
    assert "began as copies" in NeuronMatching().reading({"a": found})


def test_random_weights_are_at_chance(tmp_path: Path) -> None:
    found = stored(NeuronMatching(), random_model(layers=2, experts=4, width=80), tmp_path)
    for kind in KINDS:
        after = found.numbers[f"mean cosine after matching, {kind}"]
        for null in ("white noise", "mixtures"):
            chance = found.numbers[f"mean cosine after matching {null}, {kind}"]
            assert after == pytest.approx(chance, abs=0.03)
        assert after > 0.15
        assert abs(found.numbers[f"mean cosine before matching, {kind}"]) < 0.05
    text = NeuronMatching().reading({"a": found})
    assert "do not have the same neurons" in text and "in random order" in text
    assert "same up to order" not in text


def test_neurons_along_few_directions_are_not_the_same_neurons(tmp_path: Path) -> None:
    """White noise would call these experts alike; mixtures show that their directions are."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, 32, generator=generator)

    def expert() -> dict[str, torch.Tensor]:
        flat = {n: torch.randn(80, 3, generator=generator) @ few for n in ("up", "gate", "down")}
        return {n: w.T if n == "down" else w for n, w in flat.items()}

    model = ToyModel([torch.randn(4, 32)], [[expert() for _ in range(4)]])
    found = stored(NeuronMatching(), model, tmp_path)
    after = found.numbers["mean cosine after matching, up"]
    assert after > found.numbers["mean cosine after matching white noise, up"] + 0.2
    assert after == pytest.approx(
        found.numbers["mean cosine after matching mixtures, up"], abs=0.05
    )
    assert "do not have the same neurons" in NeuronMatching().reading({"a": found})


def test_bounds_are_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_matching, "EXPERTS", 3)
    monkeypatch.setattr(neuron_matching, "NEURONS", 20)
    model = _permuted_copies(experts=7)
    found = stored(NeuronMatching(), model, tmp_path)
    assert found.arrays["experts"].tolist() == [0, 2, 4]
    assert {name.split(".")[1] for name in model.reads} == {"0", "2", "4"}
    # A sample of the neurons of one expert still finds its partners among all of the other.
    assert found.numbers[LARGEST] == pytest.approx(1, abs=1e-5)
    assert found.notes[0] == (
        "3 of 7 experts, evenly spread, are matched with each other: 3 of 21 pairs."
    )
    assert found.notes[1].startswith("20 of 60 neurons of the first expert of a pair")


def test_values_by_pair(tmp_path: Path) -> None:
    """One copy among random experts: only this pair matches."""
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(60, 16, generator) for _ in range(3)]
    experts.append(reordered(experts[1], torch.randperm(60, generator=generator)))
    found = stored(NeuronMatching(), ToyModel([torch.randn(4, 16)], [experts]), tmp_path)
    after = found.arrays["after_LQXX"][0, 3]
    np.testing.assert_array_equal(after, after.T)
    assert np.isnan(np.diag(after)).all()
    assert after[1, 3] == pytest.approx(1, abs=1e-5)
    assert np.nanmax(np.where(after > 0.99, np.nan, after)) < 0.6
    text = NeuronMatching().reading({"a": found})
    assert "same up to order" in text


def test_four_projections(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first = random_expert(20, 8, generator, linear=True)
    second = reordered(first, torch.arange(19, -1, -1))
    second = {**second, "linear": random_expert(20, 8, generator, linear=True)["linear"]}
    found = stored(NeuronMatching(), ToyModel([torch.randn(2, 8)], [[first, second]]), tmp_path)
    assert found.arrays["kinds"].tolist() == ["up", "gate", "down", "linear", "joint"]
    assert found.numbers["mean cosine after matching, up"] == pytest.approx(1, abs=1e-5)
    assert found.numbers["mean Kendall's tau, up"] == -1
    assert found.numbers["mean cosine after matching, linear"] < 0.9
    assert 0.6 < found.numbers["mean cosine after matching, joint"] < 0.95


def test_one_expert(tmp_path: Path) -> None:
    found = stored(NeuronMatching(), random_model(experts=1), tmp_path)
    assert found.notes == ["There are no two experts to match."]
