"""The sampling rules, against frequencies worked by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_moe.errors import UsageError
from megatron_moe.inference.generation import SamplingParams, next_token

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def _frequencies(sampling: SamplingParams, draws: int = 1000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(next_token(LOGITS, sampling, generator) for _ in range(draws))
    return [counts[token] / draws for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), [0.5, 0.1, 0.3, 0.1]),
        (SamplingParams(temperature=0), [1, 0, 0, 0]),
        (SamplingParams(temperature=0.5), [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        (SamplingParams(top_k=2), [0.625, 0, 0.375, 0]),
        (SamplingParams(top_k=9), [0.5, 0.1, 0.3, 0.1]),
        (SamplingParams(top_p=0.45), [1, 0, 0, 0]),
        (SamplingParams(top_p=0.6), [0.625, 0, 0.375, 0]),
        (SamplingParams(top_p=0.85), [5 / 9, 1 / 9, 3 / 9, 0]),  # of equals, the first
        (SamplingParams(top_k=2, top_p=0.62), [1, 0, 0, 0]),  # p is of what top-k left
        (SamplingParams(top_p=0.7, temperature=0.5), [25 / 34, 0, 9 / 34, 0]),
    ],
)
def test_rules_worked_by_hand(sampling: SamplingParams, expected: list[float]) -> None:
    found = _frequencies(sampling)
    # Four standard deviations of a frequency over 1000 draws.
    assert found == pytest.approx(expected, abs=0.063)
    assert [f > 0 for f in found] == [e > 0 for e in expected]


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (SamplingParams(temperature=-1), "--temperature"),
        (SamplingParams(temperature=float("nan")), "--temperature"),
        (SamplingParams(top_k=-1), "--top-k"),
        (SamplingParams(top_p=0), "--top-p"),
        (SamplingParams(top_p=1.5), "--top-p"),
    ],
)
def test_what_is_no_distribution_is_refused(sampling: SamplingParams, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        sampling.check()
