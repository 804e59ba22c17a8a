"""What a probe says about choices, by plain loops and by hand."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from megatron_moe.analysis.analyses.context_independence import explained
from megatron_moe.analysis.nulls import entropy
from megatron_moe.training.probe_statistics import (
    Agreement,
    LayerProbe,
    ProbeResult,
    agreement,
    domain_shares,
    spread_over,
    token_share,
)


def test_agreement_by_hand() -> None:
    now = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    before = np.array([[0, 1], [3, 2], [2, 3], [3, 1]])
    # Shared: 2, 2, 0 and 1 of two choices; the first one is equal for tokens 0 and 3.
    assert agreement(now, before) == Agreement(choices=5 / 8, top1=2 / 4)
    assert agreement(now, now) == Agreement(choices=1.0, top1=1.0)


def test_random_choices_agree_as_often_as_chance_says() -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.random((20000, 8)).argsort(1)[:, :2] for _ in range(2))
    found = agreement(one, other)
    assert found.choices == pytest.approx(2 / 8, abs=0.01)
    assert found.top1 == pytest.approx(1 / 8, abs=0.01)


def by_loops(ids: list[int], choices: list[list[int]]) -> float:
    """Sum of p(t, e) log(p(t, e) / p(t) p(e)), over H(e) - log k."""
    pairs = [(t, e) for t, chosen in zip(ids, choices, strict=True) for e in chosen]
    joint, tokens, experts = Counter(pairs), *(Counter(p[i] for p in pairs) for i in (0, 1))
    n = len(pairs)
    mutual = sum(
        c / n * math.log((c / n) / (tokens[t] / n * experts[e] / n)) for (t, e), c in joint.items()
    )
    whole = -sum(c / n * math.log(c / n) for c in experts.values())
    return mutual / (whole - math.log(len(choices[0])))


def test_the_share_of_the_token_id_equals_its_definition() -> None:
    draw = random.Random(1)
    ids = [draw.randrange(30) * 7 for _ in range(500)]
    choices = [draw.sample(range(6), 2) if draw.random() < 0.5 else [t % 6, 5] for t in ids]
    choices = [c if c[0] != c[1] else [c[0], (c[0] + 1) % 6] for c in choices]
    share, chance = token_share(np.array(ids), np.array(choices), 6)
    assert share == pytest.approx(by_loops(ids, choices))
    shuffles = []
    for _ in range(30):
        draw.shuffle(ids)
        shuffles.append(by_loops(ids, choices))
    assert chance == pytest.approx(sum(shuffles) / 30, abs=0.015)
    assert share > 2 * chance


def test_a_router_by_token_id_is_explained_and_a_random_one_is_at_chance() -> None:
    draw = np.random.default_rng(2)
    ids = draw.integers(0, 50, 4000)
    share, chance = token_share(ids, (ids * 7 % 8)[:, None], 8)
    assert share == pytest.approx(1.0)
    assert chance < 0.1
    share, chance = token_share(ids, draw.integers(0, 8, (4000, 1)), 8)
    assert share == pytest.approx(chance, abs=0.01)
    assert chance > 0.01, "a sample of this size explains something by chance"
    assert token_share(ids, np.zeros((4000, 1), dtype=int), 8) == (None, None)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_several_choices_that_the_id_decides_are_explained_and_those_of_all_are_none(
    topk: int,
) -> None:
    """I / H would be two thirds for two choices of 8 experts."""
    ids = np.random.default_rng(2).integers(0, 50, 4000)
    share, _ = token_share(ids, (ids[:, None] * 3 + np.arange(topk)) % 8, 8)
    assert share == pytest.approx(1.0)
    assert token_share(ids, np.tile(np.arange(topk), (4000, 1)), 8) == (None, None)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_the_share_is_that_of_the_analysis_of_checkpoints(topk: int) -> None:
    draw = np.random.default_rng(3)
    ids = draw.integers(0, 30, 2000)
    choices = draw.random((2000, 8)).argsort(1)[:, :topk]
    own = (ids[:, None] * 5 + np.arange(topk)) % 8
    choices = np.where((draw.random(2000) < 0.5)[:, None], own, choices)
    table = np.zeros((30, 8), dtype=int)
    np.add.at(table, (np.repeat(ids, topk), choices.reshape(-1)), 1)
    number = np.bincount(ids, minlength=30)
    expected = explained(table, number, entropy(table), topk)
    assert 0.1 < expected < 0.9
    assert token_share(ids, choices, 8)[0] == pytest.approx(expected)


def test_shares_by_domain_by_hand() -> None:
    choices = np.array([[0, 1], [0, 2], [1, 2]])
    shares = domain_shares(np.array([0, 0, 2]), choices, 3, 4)
    assert shares == ((0.5, 0.25, 0.25, 0.0), (0.0,) * 4, (0.0, 0.5, 0.5, 0.0))


def test_remembered_tokens_are_spread_evenly() -> None:
    assert list(spread_over(10, 4)) == [0, 3, 6, 9]
    assert list(spread_over(10, 10)) == list(range(10))
    assert len(spread_over(1000, 7)) <= 7


def test_as_json() -> None:
    layer = LayerProbe(
        previous=None,
        first=Agreement(choices=0.5, top1=0.25),
        token_share=0.3,
        token_share_chance=0.1,
        logit_rms=2.0,
        logit_drift=1.5,
        domain_shares=((0.5, 0.5), (1.0, 0.0)),
    )
    result = ProbeResult(
        iteration=7, tokens=9, chance=0.5, domains=("prose", "code"), layers={3: layer}
    )
    found = json.loads(json.dumps(result.to_json()))
    assert found["layers"]["3"]["first"] == {"choices": 0.5, "top1": 0.25}
    assert found["layers"]["3"]["previous"] is None
    assert found["layers"]["3"]["domain_shares"] == {"prose": [0.5, 0.5], "code": [1.0, 0.0]}
