"""Assignments of neurons: planted orders, brute force, chance levels."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from megatron_moe.analysis.weights.matching import (
    JOINT,
    assignment_solver,
    match,
    mixed_neurons,
    random_match,
)
from megatron_moe.errors import UsageError


def _noise(seed: int, width: int, hidden: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(width, hidden, generator=generator) for n in ("up", "gate", "down")}


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_a_permuted_copy() -> None:
    first = _noise(0, 100, 16)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    second = {name: matrix[order] for name, matrix in first.items()}
    found = match(first, second, torch.arange(100))
    for each in found.values():
        assert each.after == pytest.approx(1, abs=1e-5)
        assert abs(each.before) < 0.1 and abs(each.tau) < 0.2
    same = match(first, first, torch.arange(100))
    assert all(each.before == pytest.approx(1) and each.tau == 1 for each in same.values())


def test_a_sample_of_the_neurons_finds_them_all() -> None:
    first = _noise(0, 100, 16)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    second = {name: matrix[order] for name, matrix in first.items()}
    places = torch.tensor([3, 10, 50, 99])
    found = match({n: m[places] for n, m in first.items()}, second, places)
    assert found[JOINT].after == pytest.approx(1, abs=1e-5)
    before = [_cosine(first["up"][p], second["up"][p]) for p in places]
    assert found["up"].before == pytest.approx(sum(before) / 4, abs=1e-6)


def test_projections_permuted_apart_are_not_the_same_function() -> None:
    """Each alone matches perfectly, all together do not."""
    first = _noise(0, 60, 16)
    second = {
        name: matrix[torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        for seed, (name, matrix) in enumerate(first.items())
    }
    found = match(first, second, torch.arange(60))
    assert all(found[name].after == pytest.approx(1, abs=1e-5) for name in first)
    assert found[JOINT].after < 0.6


def test_the_best_of_all_assignments() -> None:
    """5 neurons with partners among 6, by trying each."""
    first, second = _noise(2, 6, 4), _noise(3, 6, 4)
    places = torch.tensor([0, 1, 2, 4, 5])
    found = match({n: m[places] for n, m in first.items()}, second, places)
    vectors = {name: (first[name][places], second[name]) for name in first}
    vectors[JOINT] = tuple(
        torch.cat(list(m.values()), 1) for m in ({n: m[places] for n, m in first.items()}, second)
    )
    for name, (own, others) in vectors.items():
        cosine = [[_cosine(a, b) for b in others] for a in own]
        best = max(
            itertools.permutations(range(6), 5),
            key=lambda order: sum(cosine[a][b] for a, b in enumerate(order)),
        )
        assert found[name].after == pytest.approx(
            sum(cosine[a][b] for a, b in enumerate(best)) / 5, abs=1e-5
        )
        ordered = [1 if best[a] < best[b] else -1 for a, b in itertools.combinations(range(5), 2)]
        assert found[name].tau == pytest.approx(sum(ordered) / 10)


def test_random_neurons_find_partners_too() -> None:
    """The chance level is that of any two experts of white noise of these sizes."""
    places = torch.arange(0, 80, 2)
    chance = random_match(("up", "gate", "down"), places, 80, 32, seed=9)
    first, second = _noise(10, 80, 32), _noise(11, 80, 32)
    found = match({n: m[places] for n, m in first.items()}, second, places)
    for name, each in found.items():
        assert chance[name].after == pytest.approx(each.after, abs=0.03)
        assert each.after > 0.2
        assert abs(each.before) < 0.12
    assert found[JOINT].after < found["up"].after - 0.1


def test_mixtures_have_the_second_moments_of_the_neurons() -> None:
    """Neurons along one direction: noise is unlike them, mixtures are like them."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    neurons = {"up": torch.randn(4000, 1, generator=generator) * direction + 0.01}
    mixed = mixed_neurons(neurons, 3000, generator)["up"]
    expected = neurons["up"].T @ neurons["up"] / 4000
    found = mixed.T @ mixed / 3000
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_neurons_of_zeros_are_similar_to_none() -> None:
    first, second = _noise(0, 8, 4), _noise(1, 8, 4)
    first["up"][3] = 0
    found = match(first, second, torch.arange(8))
    assert all(abs(each.after) <= 1 for each in found.values())


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # an import of it fails
    with pytest.raises(UsageError, match=r"scipy must be installed .*megatron-moe\[analysis\]"):
        assignment_solver()
