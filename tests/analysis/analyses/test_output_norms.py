"""Ranks of norms and scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_moe.analysis.analyses.output_norms import OutputNorms, overlap, spearman
from tests.analysis.expert_cases import planted, result_of, texts


def _counts(scores: Any, norms: Any) -> Any:
    experts = scores.shape[1]
    counts = np.zeros((experts, experts))
    for s, n in zip(scores, norms, strict=True):
        by_score, by_norm = np.argsort(-s), np.argsort(-n)
        for rank, e in enumerate(by_score):
            counts[rank, list(by_norm).index(e)] += 1
    return counts


def test_correlation_and_overlap_of_counts_are_those_of_each_token() -> None:
    rng = np.random.default_rng(0)
    scores, norms = rng.random((40, 7)), rng.random((40, 7))
    norms += 0.5 * scores
    counts = _counts(scores, norms)
    each = [stats.spearmanr(s, n).statistic for s, n in zip(scores, norms, strict=True)]
    assert spearman(counts) == pytest.approx(np.mean(each))
    same = [
        len(set(np.argsort(-s)[:3]) & set(np.argsort(-n)[:3])) / 3
        for s, n in zip(scores, norms, strict=True)
    ]
    assert overlap(counts, 3) == pytest.approx(np.mean(same))
    assert math.isnan(spearman(np.ones((1, 1))))


def test_an_expert_with_ten_times_the_norm_and_the_largest_score(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[3] *= 10
            layer.mlp.experts.down_proj_bias.zero_()
            layer.mlp.router.bias[3] = 40

    model, sample = planted(tmp_path, "gpt_oss", plant), texts(tmp_path)
    found = result_of(OutputNorms(), model, sample, tmp_path)
    ranks_LEE = found.arrays["ranks_LEE"]
    tokens = found.numbers["tokens"]
    assert (ranks_LEE[:, 0, 0] > 0.8 * tokens).all()
    assert ranks_LEE[:, 0].sum() == 3 * tokens
    assert found.arrays["norm_LE"].argmax(1).tolist() == [3, 3, 3]
    assert found.arrays["score_LE"].argmax(1).tolist() == [3, 3, 3]
    # It is the same expert for any token, so that scores of other tokens do as well.
    n = found.numbers
    assert n["rank correlation"] > 0.15
    assert n["rank correlation with scores of other tokens"] > 0.5 * n["rank correlation"]
    assert n["norm of chosen experts over that of all"] > 1.3
    said = OutputNorms().reading({"a": found})
    assert "as in the paper" in said and "most of it comes from experts" in said


def test_unrelated_norms_are_within_chance(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "olmoe", hidden_size=32), texts(tmp_path, rows=60, length=20)
    found = result_of(OutputNorms(), model, sample, tmp_path)
    n = found.numbers
    assert abs(n["rank correlation"]) < 0.15
    assert n["overlap of the k largest"] == pytest.approx(0.5, abs=0.06)
    assert n["overlap by chance"] == 0.5
    # Of a token it is 1 / sqrt(E - 1) for unrelated ranks.
    deviation = n["standard deviation of the correlation by chance"]
    assert deviation == pytest.approx(1 / math.sqrt(5 * n["tokens"]))
    assert n["tokens with the same k experts by chance"] == pytest.approx(1 / 20)
    assert n["tokens with the same k experts"] == pytest.approx(1 / 20, abs=0.05)
    for name in ("equal_L", "shuffled_equal_L", "overlap_L", "shuffled_overlap_L"):
        assert ((found.arrays[name] >= 0) & (found.arrays[name] <= 1)).all()
