"""Windows of several lengths use every token once an epoch, whatever the length of the run."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_moe.data.objectives.rng import sample_rng
from megatron_moe.data.objectives.windows import Windows, cut_windows, draw_kinds

SIZES, WEIGHTS = (5, 9, 14), (0.2, 0.3, 0.5)
RNG = sample_rng(1, "windows")


def cut(lengths: list[int], samples: int, first: int = 0) -> Windows:
    documents = np.arange(first, first + len(lengths), dtype=np.int32)
    return Windows(*cut_windows(RNG, documents, np.array(lengths), SIZES, WEIGHTS, samples))


def tokens(windows: Windows, lengths: list[int], window: int, first: int = 0) -> list:
    """(document, token) of a window, token by token."""
    place, offset = windows.starts[window].tolist()
    found = []
    while len(found) < SIZES[windows.kinds[window]]:
        document = int(windows.documents[place])
        if offset < lengths[document - first]:
            found.append((document, offset))
            offset += 1
        else:
            place, offset = place + 1, 0
    return found


LENGTHS = [3, 0, 40, 1, 7, 0, 0, 22, 11, 60, 2]


@pytest.mark.parametrize("samples", [1, 5, 20, 60])
def test_every_token_once_an_epoch(samples: int) -> None:
    windows = cut(LENGTHS, samples, first=100)
    count, total = len(windows.order), sum(LENGTHS)
    assert count >= samples
    assert sorted(windows.order.tolist()) == list(range(count))
    stream = [t for w in range(count) for t in tokens(windows, LENGTHS, w, 100)]
    epochs = len(stream) // total
    assert epochs >= 1
    every = {(100 + d, t) for d, n in enumerate(LENGTHS) for t in range(n)}
    for epoch in range(epochs):
        assert set(stream[epoch * total : (epoch + 1) * total]) == every
    rest = stream[epochs * total :]
    assert len(rest) == len(set(rest)) < max(SIZES)


def test_epochs_have_orders_of_their_own() -> None:
    windows = cut(LENGTHS, 60)
    first, second = (windows.documents[e * 11 : (e + 1) * 11].tolist() for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(11))


def test_a_longer_run_begins_as_the_shorter() -> None:
    short, long = cut(LENGTHS, 20), cut(LENGTHS, 100)
    count = len(short.order)
    assert len(long.order) > count
    for name in ("starts", "kinds", "order"):
        assert (getattr(long, name)[:count] == getattr(short, name)).all()


def test_shuffled_within_the_epoch() -> None:
    windows = cut([100] * 30, 100)
    begins = np.cumsum([SIZES[k] for k in windows.kinds]) - np.array(SIZES)[windows.kinds]
    epochs = (begins // 3000)[windows.order]
    assert (np.diff(epochs) >= 0).all()
    assert (windows.order != np.arange(len(windows.order))).mean() > 0.9


def test_less_text_than_a_window() -> None:
    windows = cut([0, 2, 0], 4)
    assert len(windows.order) >= 4
    for window in range(len(windows.order)):
        start = int(sum(SIZES[k] for k in windows.kinds[:window])) % 2
        expected = [(1, (start + i) % 2) for i in range(SIZES[windows.kinds[window]])]
        assert tokens(windows, [0, 2, 0], window) == expected


def test_shares_of_many_windows() -> None:
    """Within 4.5 standard deviations for 10^5 windows of the paper's weights."""
    weights, count = (0.1, 0.1, 0.1, 0.1, 0.1, 0.5), 100_000
    shares = np.bincount(draw_kinds(RNG, weights, count), minlength=6) / count
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight) < 4.5 * np.sqrt(weight * (1 - weight) / count)
    assert (draw_kinds(RNG, weights, 100) == draw_kinds(RNG, weights, count)[:100]).all()
    doubled = [2 * weight for weight in weights]
    assert (draw_kinds(RNG, doubled, 100) == draw_kinds(RNG, weights, 100)).all()


def test_beyond_two_to_the_31_tokens() -> None:
    """Five documents of 2^30 tokens, cut every 3 * 2^28: where each window starts, by hand."""
    length, size = 1 << 30, 3 << 28
    lengths = np.full(5, length, dtype=np.int32)
    windows = Windows(*cut_windows(RNG, np.arange(5), lengths, (size,), (1,), 6))
    begins = [size * w for w in range(len(windows.starts))]
    assert begins[-1] > 2**32
    assert windows.starts.tolist() == [[b // length, b % length] for b in begins]
    assert sorted(windows.documents[:5].tolist()) == list(range(5))


def test_the_example_of_the_windows() -> None:
    """Sizes 2 and 3 over documents of 3 and 4 tokens: each window starts where one ends."""
    lengths = np.array([3, 4])
    windows = Windows(*cut_windows(RNG, np.array([0, 1]), lengths, (2, 3), (1, 1), 6))
    place, before = 0, 0
    for (start, offset), kind in zip(windows.starts.tolist(), windows.kinds, strict=True):
        ends = np.cumsum(lengths[windows.documents]).tolist()
        while ends[place] <= before:
            place += 1
        assert (start, offset) == (place, before - (ends[place - 1] if place else 0))
        before += (2, 3)[kind]
    assert before >= 7
