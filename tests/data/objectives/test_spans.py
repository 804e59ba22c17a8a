"""Span corruption by hand, against T5's published numbers, and in the mean of many samples."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megatron_moe.data.objectives.rng import sample_rng
from megatron_moe.data.objectives.spans import corrupt, random_partition, random_spans, span_counts

SAMPLES = 100_000


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_segments_by_hand() -> None:
    """Five items have four places to cut; the two smallest numbers are at the 2nd and the 4th."""
    assert random_partition(words(50, 10, 90, 30), 5, 3).tolist() == [2, 2, 1]
    assert random_partition(words(10, 50, 30, 90), 5, 3).tolist() == [1, 2, 2]
    assert random_partition(words(1, 2, 3, 4), 5, 1).tolist() == [5]
    assert random_partition(words(4, 3, 2, 1), 5, 5).tolist() == [1] * 5
    assert random_partition(words(), 1, 1).tolist() == [1]


def test_corruption_by_hand() -> None:
    """The text a b c d e f g h i j; c and g h i j are hidden."""
    text = np.arange(10, 20)
    inputs, targets = corrupt(text, np.array([2, 3]), np.array([1, 4]), range(99, 89, -1))
    assert inputs.tolist() == [10, 11, 99, 13, 14, 15, 98]
    assert targets.tolist() == [99, 12, 98, 16, 17, 18, 19]


@pytest.mark.parametrize(
    ("length", "rate", "mean", "expected"),
    [
        (568, 0.15, 3, (85, 28)),  # T5: 568 tokens fill 512 inputs, with 114 targets
        (10, 0.5, 3, (5, 2)),
        (2, 0.15, 3, (1, 1)),  # at least one
        (3, 0.9, 64, (2, 1)),  # at least one kept
        (7, 0.5, 1, (4, 3)),  # 3.5 rounds to 4, and three kept tokens part three spans
    ],
)
def test_counts(length: int, rate: float, mean: float, expected: tuple[int, int]) -> None:
    assert span_counts(length, rate, mean) == expected


def restored(inputs: list[int], targets: list[int], sentinels: list[int]) -> list[int]:
    """The text: every sentinel of the inputs is replaced by what follows it in the targets."""
    hidden: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            hidden[token] = []
            last = token
        else:
            hidden[last].append(token)
    return [t for token in inputs for t in (hidden[token] if token in sentinels else [token])]


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.5, 64)])
def test_text_comes_back(rate: float, mean: float) -> None:
    noise, sentinels = sample_rng(1, "test"), list(range(5000, 4700, -1))
    for index in range(40):
        length = 20 + 13 * index
        text = np.random.default_rng(index).integers(0, 4000, length)
        kept, hidden = random_spans(noise.words(0, index, length), length, rate, mean)
        inputs, targets = corrupt(text, kept, hidden, sentinels)
        assert restored(inputs.tolist(), targets.tolist(), sentinels) == text.tolist()
        used = [t for t in inputs.tolist() if t in sentinels]
        assert used == sentinels[: len(kept)] == [t for t in targets.tolist() if t in sentinels]


def test_all_segmentations_are_equally_likely() -> None:
    """Ten ways to cut six items into three parts; chi-squared with 9 degrees of freedom."""
    noise, draws = sample_rng(2, "segments"), 20_000
    every = noise.words(0, 0, 5 * draws).reshape(draws, 5)
    counts = Counter(tuple(random_partition(row, 6, 3).tolist()) for row in every)
    ways = {w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6}
    assert set(counts) == ways
    chi = sum((n - draws / 10) ** 2 / (draws / 10) for n in counts.values())
    assert chi < 27.9  # exceeded once in a thousand seeds


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 3.0)])
def test_statistics_of_many_samples(rate: float, mean: float) -> None:
    """Corruption rate and mean span are exact; where and how long the spans are is random.

    The first hidden span's length, and whether a given token is hidden, follow from the uniform
    partition: P(length of a part = l) = C(n - l - 1, k - 2) / C(n - 1, k - 1).
    """
    length, noise = 24, sample_rng(3, "statistics", int(100 * rate))
    hidden_tokens, spans = span_counts(length, rate, mean)
    assert hidden_tokens == round(24 * rate)
    every = noise.words(0, 0, length * SAMPLES).reshape(SAMPLES, length)
    drawn = [random_spans(row, length, rate, mean) for row in every]
    kept, hidden = (np.stack(part) for part in zip(*drawn, strict=True))
    assert kept.shape == hidden.shape == (SAMPLES, spans)
    assert (hidden.sum(1) == hidden_tokens).all()
    assert (kept.sum(1) == length - hidden_tokens).all()
    assert kept.min() >= 1
    assert hidden.min() >= 1
    for lengths, items in ((hidden, hidden_tokens), (kept, length - hidden_tokens)):
        if spans == 1:
            continue
        for column in range(spans):
            check_shares(lengths[:, column], items, spans)


def check_shares(lengths: np.ndarray, items: int, parts: int) -> None:
    """Within 4.5 standard deviations of the exact share of each length."""
    for value in range(1, items - parts + 2):
        exact = math.comb(items - value - 1, parts - 2) / math.comb(items - 1, parts - 1)
        bound = 4.5 * math.sqrt(exact * (1 - exact) / SAMPLES)
        assert abs((lengths == value).mean() - exact) <= bound
