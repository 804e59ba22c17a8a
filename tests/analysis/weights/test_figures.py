"""How many layers plots show, and the colours of heat maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.router_similarity import PAIRS, RouterSimilarity
from megatron_moe.analysis.weights.figures import shown_layers, similarity_map
from tests.analysis.weights.toy import random_model, stored


def test_few_layers_are_all_shown() -> None:
    assert shown_layers([1, 3, 5, 7], 1024) == [0, 1, 2, 3]
    assert shown_layers([4], 10**9) == [0]
    assert shown_layers([4, 6], 10**9) == [0, 1]


def test_of_many_some_that_are_evenly_spread() -> None:
    assert shown_layers(list(range(45)), 64) == list(range(0, 45, 4))
    # 256 experts: 65,536 cells.
    assert shown_layers(list(range(3, 61)), 1 << 16) == [0, 28, 57]


@pytest.mark.parametrize(
    ("values", "ends", "centre"),
    [
        ((0.1, -0.3), (-0.3, 0.3), 0.0),
        ((0.1, 0.3), (-0.3, 0.3), 0.0),
        ((0.2, 0.3), (0.2, 0.3), None),
    ],
)
def test_colours(values: tuple[float, float], ends: tuple[float, float], centre: object) -> None:
    """Symmetric around 0, unless that would hide the differences of values far above it."""
    first, second = values
    shown = np.array([[np.nan, first, second], [first, np.nan, second], [second, second, np.nan]])
    found = similarity_map(shown, ["0", "1", "2"])
    assert (found.range, found.centre) == (ends, centre)
    empty = similarity_map(np.full((1, 1), np.nan), ["0"])
    assert empty.range == (-1.0, 1.0)


def test_a_scatter_plot_of_many_pairs_shows_some(tmp_path: Path) -> None:
    model = random_model(layers=1, experts=50, width=4, hidden=8)
    found = stored(RouterSimilarity(), model, tmp_path, draws=1)
    figures = {f.key: f for f in RouterSimilarity().figures({"a": found})}
    series = figures["router-experts-a"].panels["layer 1"].series  # type: ignore[union-attr]
    assert len(series[0].x) == PAIRS < 50 * 49 // 2
    assert "1000 of the pairs" in figures["router-experts-a"].caption
    i, j = (int(word) for word in series[1].text[PAIRS // 2].split()[1::2])
    means = [model.weights(1).experts[e].gate.whole().double().mean(0) for e in (i, j)]
    expected = torch.nn.functional.cosine_similarity(*means, dim=0)
    assert series[1].y[PAIRS // 2] == pytest.approx(float(expected), abs=1e-6)
