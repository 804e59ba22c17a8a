"""Weights along a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.chosen_experts import ChosenExperts, same_first
from tests.analysis.expert_cases import KINDS, planted, result_of, texts


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_kept_choices(tmp_path: Path, kind: str) -> None:
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=3, batch_size=2)
    found = result_of(ChosenExperts(), model, sample, tmp_path)
    weights, sizes = found.arrays["weights_DLNE"], model.sizes
    assert weights.shape == (2, len(sizes.moe_layers), 12, sizes.num_experts)
    runner, done = model.load("cpu", torch.float32), set()
    for batch in sample.batches():
        if batch.domain in done:
            continue
        done.add(batch.domain)
        seen = runner.run(batch)
        for place, layer in enumerate(seen.layers):
            for n in range(12):
                expected = [0.0] * sizes.num_experts
                for k in range(sizes.topk):
                    if layer.kept_TK[n, k]:
                        expected[int(layer.ids_TK[n, k])] = float(layer.weights_TK[n, k])
                assert weights[batch.domain, place, n].tolist() == pytest.approx(expected)
        pieces = [model.piece(int(i)) for i in batch.tokens_BS[0]]
        assert found.arrays["pieces_DN"][batch.domain].tolist() == pieces
    if kind == "native":
        assert (weights > 0).sum() < 2 * 12 * sizes.topk  # some choices found no slot


def test_same_first_by_hand() -> None:
    first = [0, 0, 1, 1, 1, 2]
    weights = np.zeros((1, 1, 6, 3))
    for token, expert in enumerate(first):
        weights[0, 0, token, expert] = 1
    same, chance = same_first(weights)
    assert same[0, 0] == pytest.approx(3 / 5)
    orders = [a == b for i, a in enumerate(first) for j, b in enumerate(first) if i != j]
    assert chance[0, 0] == pytest.approx(np.mean(orders))
    weights[0, 0, 1] = 0  # without a first expert: two pairs less
    same, _ = same_first(weights)
    assert same[0, 0] == pytest.approx(2 / 3)
