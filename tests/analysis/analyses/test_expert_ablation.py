"""The loss without each of some experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_moe.analysis.ablation import ALL, evaluate, evaluate_without
from megatron_moe.analysis.analyses import expert_ablation
from megatron_moe.analysis.analyses.expert_ablation import ExpertAblation, spread_layers
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import KINDS, planted, result_of, setting_of, texts


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_differences_of_losses(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_ablation, "EXPERTS", 6)
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=4)
    found = result_of(ExpertAblation(), model, sample, tmp_path)
    arrays, runner = found.arrays, model.load("cpu", torch.float32)
    whole = evaluate(runner, sample)[ALL].loss
    counts = {
        layer.layer: np.zeros(model.sizes.num_experts)
        for layer in runner.run(next(sample.batches())).layers
    }
    for batch in sample.batches():
        for layer in runner.run(batch).layers:
            counts[layer.layer] += layer.counts_E.numpy()
    places = list(zip(arrays["layers_A"].tolist(), arrays["experts_A"].tolist(), strict=True))
    if kind == "olmoe":
        assert places == [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 3)]
    elif kind == "native":
        assert places == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert len(places) == min(6, len(model.sizes.moe_layers) * model.sizes.num_experts)
    for i, (layer, expert) in enumerate(places):
        without = evaluate_without(runner, sample, {layer: [expert]})[ALL].loss
        assert arrays["change_A"][i] == pytest.approx(without - whole, abs=1e-9)
        assert arrays["low_A"][i] <= arrays["change_A"][i] <= arrays["high_A"][i]
        assert arrays["load_A"][i] == pytest.approx(counts[layer][expert] / sample.tokens)
    expected = stats.spearmanr(arrays["load_A"], arrays["change_A"]).statistic
    assert found.numbers["rank correlation with load"] == pytest.approx(expected)


def test_an_expert_that_does_nothing_is_not_missed(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()

    model = planted(tmp_path, "mixtral", plant)
    found = result_of(ExpertAblation(), model, texts(tmp_path, rows=4), tmp_path)
    assert np.abs(found.arrays["change_A"]).max() < 1e-6
    assert found.numbers["experts without which the loss is higher"] == 0


def test_layers_are_spread() -> None:
    assert spread_layers([1, 3, 5, 7, 9], 3) == [1, 5, 9]
    assert spread_layers([4], 3) == [4]
    assert spread_layers([2, 8], 3) == [2, 8]


def test_models_that_use_all_experts_and_single_rows_are_refused(tmp_path: Path) -> None:
    model = planted(tmp_path, "olmoe", num_experts_per_tok=6)
    with pytest.raises(UsageError, match=r"number of experts must be > 6, .* \(got 6\)"):
        ExpertAblation().check(setting_of(model, texts(tmp_path)))
    (tmp_path / "other").mkdir()
    short = texts(tmp_path / "other", rows=1, domains=1)
    with pytest.raises(UsageError, match=r"rows of --data must be >= 2"):
        ExpertAblation().check(setting_of(planted(tmp_path, "mixtral"), short))
