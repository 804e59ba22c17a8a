"""Dead neurons, and where the intermediate state is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.analysis.analyses.neuron_activity import (
    NeuronActivity,
    concentration,
    in_columns,
)
from tests.analysis.expert_cases import planted, result_of, texts


def test_dead_neurons_are_found(tmp_path: Path) -> None:
    dead = {(0, 1): [0, 3, 7], (2, 5): [11]}

    def plant(model: Any) -> None:
        for (layer, expert), neurons in dead.items():
            model.model.layers[layer].mlp.experts.gate_up_proj[expert, neurons] = 0

    model = planted(tmp_path, "olmoe", plant)
    found = result_of(NeuronActivity(), model, texts(tmp_path), tmp_path)
    active_LEF = found.arrays["active_LEF"]
    assert active_LEF.shape == (3, 6, 12)
    places = {
        (la, e): np.flatnonzero(active_LEF[la, e] == 0).tolist()
        for la in range(3)
        for e in range(6)
    }
    assert {key: value for key, value in places.items() if value} == dead
    assert found.numbers["dead neurons"] == pytest.approx(4 / (3 * 6 * 12))
    assert found.arrays["dead_L"] == pytest.approx([3 / 72, 0, 1 / 72])
    assert found.numbers["active neurons of a token"] > 0.9
    table = found.tables[0]
    row = list(zip(table.columns["layer"], table.columns["expert"], strict=True)).index((0, 1))
    assert table.columns["dead"][row] == pytest.approx(3 / 12)
    # The state of a dead neuron is 0 as well.
    assert found.arrays["inner_LEF"][0, 1, [0, 3, 7]].tolist() == [0, 0, 0]
    assert "are active for none of the" in NeuronActivity().reading({"a": found})


def test_concentration_of_a_state() -> None:
    even, one = np.ones(20), np.zeros(20)
    one[4] = 7
    mixed = np.array([5.0, 3.0, *[0.5] * 18])  # the largest two of 20 hold 8 of 17
    found = concentration(np.array([[even, one, mixed, np.zeros(20)]]))
    assert found[0, :3] == pytest.approx([0.1, 1.0, 8 / 17])
    assert np.isnan(found[0, 3])


def test_columns_keep_the_mean_and_the_order() -> None:
    values = np.array([[4.0, 1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 5.0]])
    assert in_columns(values, 9).tolist() == [[4, 3, 2, 1, 0], [5, 0, 0, 0, 0]]
    assert in_columns(values, 2).tolist() == [[3.5, 1.0], [2.5, 0.0]]
