"""Copies, unrelated experts, and experts that ignore the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.analysis.analyses.output_similarity import OutputSimilarity
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import planted, result_of, setting_of, texts

WIDE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2}


def test_a_copy_has_similarity_one_and_others_half(tmp_path: Path) -> None:
    def copy(model: Any) -> None:
        experts = model.model.layers[1].mlp.experts
        experts.gate_up_proj[4] = experts.gate_up_proj[2]
        experts.down_proj[4] = 3 * experts.down_proj[2]  # the direction counts, not the length

    model = planted(tmp_path, "olmoe", copy, **WIDE)
    found = result_of(OutputSimilarity(), model, texts(tmp_path), tmp_path)
    similarity_LEE = found.arrays["similarity_LEE"]
    assert similarity_LEE[1, 2, 4] == pytest.approx(1, abs=1e-3)
    assert similarity_LEE[1, 4, 2] == pytest.approx(1, abs=1e-3)
    assert found.numbers["largest similarity of two experts"] == pytest.approx(1, abs=1e-3)
    others = [similarity_LEE[la, i, j] for la in (0, 1) for i in range(6) for j in range(i)]
    others.remove(similarity_LEE[1, 4, 2])
    assert np.mean(others) == pytest.approx(0.5, abs=0.02)
    by_hand = [similarity_LEE[0, i, j] for i in range(6) for j in range(6) if i != j]
    assert found.arrays["mean_L"][0] == pytest.approx(np.mean(by_hand))
    short_DLEE = found.arrays["short_DLEE"]
    assert short_DLEE[:, 1, 2, 4] == pytest.approx([1, 1], abs=1e-3)
    assert short_DLEE.shape == (2, 2, 6, 6)


def test_what_does_not_depend_on_the_token_shows_with_other_tokens(tmp_path: Path) -> None:
    def constant(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj_bias += 1000.0

    model = planted(tmp_path, "gpt_oss", constant)
    found = result_of(OutputSimilarity(), model, texts(tmp_path), tmp_path)
    assert found.numbers["mean similarity"] > 0.95
    assert found.numbers["mean similarity for different tokens"] > 0.95
    assert "are alike" in OutputSimilarity().reading({"a": found})
    plain = planted(tmp_path, "gpt_oss")
    found = result_of(OutputSimilarity(), plain, texts(tmp_path), tmp_path / "pass")
    assert found.numbers["mean similarity for different tokens"] < 0.6


def test_rows_of_one_token_are_too_short(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "olmoe"), texts(tmp_path, length=2)
    with pytest.raises(UsageError, match=r"--seq-length must be >= 3, .* \(got 2\)"):
        OutputSimilarity().check(setting_of(model, sample))
