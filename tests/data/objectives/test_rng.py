"""Random words are a function of key, stream and sample, and of nothing else."""

from __future__ import annotations

import numpy as np

from megatron_moe.data.objectives.rng import sample_rng


def philox(key: int, counter: int) -> list[int]:
    """One block of Philox4x64-10 written out (Salmon et al., SC 2011): four words."""
    low, word = (1 << 64) - 1, 64
    c = [counter >> (word * i) & low for i in range(4)]
    k = [key & low, key >> word & low]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> word) ^ c[1] ^ k[0], b & low, (a >> word) ^ c[3] ^ k[1], a & low]
        k = [k[0] + 0x9E3779B97F4A7C15 & low, k[1] + 0xBB67AE8584CAA73B & low]
    return c


def test_words_are_philoxs() -> None:
    """The counter is incremented before each block."""
    rng = sample_rng(7, "x")
    for stream, index in ((0, 0), (3, 5), (1, 2**40)):
        base = (stream << 192) + (index << 64)
        expected = philox(rng.key, base + 1) + philox(rng.key, base + 2)
        assert rng.words(stream, index, 8).tolist() == expected


def test_order_of_drawing_does_not_matter() -> None:
    rng = sample_rng(1, "data", 3)
    forward = [rng.words(2, i, 10).tolist() for i in range(50)]
    backward = [sample_rng(1, "data", 3).words(2, i, 10).tolist() for i in reversed(range(50))]
    assert backward[::-1] == forward
    assert rng.words(2, 7, 30)[:10].tolist() == forward[7]


def test_keys_streams_and_samples_differ() -> None:
    rngs = [sample_rng(s, *w) for s in (1, 2) for w in (("a",), ("b",), ("a", 1))]
    drawn = [tuple(n.words(stream, i, 4)) for n in rngs for stream in (0, 1) for i in (0, 1, 2)]
    assert len({word for words in drawn for word in words}) == 4 * len(drawn)


def test_uniform_and_order() -> None:
    rng = sample_rng(5, "u")
    count = (1 << 20) + 7
    blocks = list(rng.uniform(0, 0, count))
    assert [len(block) for block in blocks] == [1 << 20, 7]
    values = np.concatenate(blocks)
    assert (values * 2**53 == rng.words(0, 0, count) >> 11).all()
    assert 0 <= values.min() < values.max() < 1
    assert abs(values.mean() - 0.5) < 4.5 / np.sqrt(12 * len(values))
    assert sorted(rng.permutation(0, 3, 1000).tolist()) == list(range(1000))
    firsts = np.bincount([rng.permutation(1, i, 4)[0] for i in range(4000)])
    assert (abs(firsts - 1000) < 4.5 * np.sqrt(750)).all()
