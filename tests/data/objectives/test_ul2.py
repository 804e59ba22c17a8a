"""UL2 rows by hand, the text that comes back from them, and the same rows in every layout."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.data.blend import Blend
from megatron_moe.data.datasets import build_split
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.objectives.denoiser import Denoiser
from megatron_moe.data.objectives.rng import SampleRng, sample_rng
from megatron_moe.data.objectives.spans import random_split
from megatron_moe.data.objectives.ul2 import FittedDenoiser, pack_row
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer, sentinel_ids, unpadded_vocab_size
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.data.corpus import random_documents, write
from tests.data.objectives.runs import GLOBAL, STEPS, Row, data_of, objective_config, order, rows

VOCAB, EXTRA, EOD = 1050, 50, 999
"""Of a NullTokenizer with 50 extra ids; those of text are below 999."""
MIXTURE = """
[[denoiser]]
prefix = "7 8"
mean_span = 3
rate = 0.15
weight = 1

[[denoiser]]
prefix = "9"
mean_span = 2
rate = 0.5
weight = 1

[[denoiser]]
prefix = "6"
kind = "prefix-lm"
weight = 2
"""
SETTINGS = {"objective": "ul2", "vocab_size": VOCAB, "vocab_extra_ids": EXTRA, "seq_length": 64}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Prefix of indexed data, and the mixture's file."""
    folder = tmp_path_factory.mktemp("ul2")
    documents = [[i + 10 if i < 980 else i for i in doc] for doc in random_documents(200)]
    (folder / "mixture.toml").write_text(MIXTURE)
    return write(folder / "x", documents), str(folder / "mixture.toml")


def ul2(corpus: tuple[str, str], **changes: Any) -> Any:
    return data_of(corpus[0], **{**SETTINGS, "ul2_mixture": corpus[1], **changes})


class Fixed(SampleRng):
    """Noise that a person can follow."""

    def words(self, lane: int, index: int, count: int) -> np.ndarray:
        return np.array([5, 1, 9, 8, 4, 7, 2, 6, 3, 10][:count], dtype=np.uint64)


def fitted(text: int, **changes: Any) -> FittedDenoiser:
    settings = {"prefix": "p", "kind": "span", "mean_span": 2.0, "rate": 0.4, "weight": 1.0}
    return FittedDenoiser(
        denoiser=Denoiser(**{**settings, **changes}), prefix_ids=(7, 8), text=text
    )


def test_a_denoised_row_by_hand() -> None:
    """Ten tokens, four hidden in two spans, six kept.

    Hidden: three places to cut with numbers 5 1 9, the smallest at the second: lengths 2 2.
    Kept: the numbers after the first four, 4 7 2 6 3: the smallest at the third: lengths 3 3.
    """
    text, sentinels = np.arange(20, 30), range(99, 89, -1)
    inputs, targets = fitted(10).hide(Fixed(0), 0, text, sentinels)
    assert inputs.tolist() == [7, 8, 20, 21, 22, 99, 25, 26, 27, 98]
    assert targets.tolist() == [99, 23, 24, 98, 28, 29]
    sample = pack_row(inputs, targets, 20, end=1, pad=0)
    row = [7, 8, 20, 21, 22, 99, 25, 26, 27, 98, 1, 99, 23, 24, 98, 28, 29, 1, 0, 0]
    assert sample["tokens"].tolist() == row
    assert sample["labels"].tolist() == [*row[1:], 0]
    counted = sample["labels"][sample["loss_mask"]].tolist()
    assert counted == [99, 23, 24, 98, 28, 29, 1]
    assert sample["loss_mask"].tolist() == [False] * 10 + [True] * 7 + [False] * 3


def test_a_full_row() -> None:
    sample = pack_row(np.array([5, 6]), np.array([7]), 5, end=1, pad=0)
    assert sample["tokens"].tolist() == [5, 6, 1, 7, 1]
    assert sample["labels"].tolist() == [6, 1, 7, 1, 0]
    assert sample["loss_mask"].tolist() == [False, False, True, True, False]


def test_prefix_lm_by_hand() -> None:
    """The first number, 5 of 2^64, is next to nothing: the split is after the first token."""
    text = np.arange(20, 24)
    denoiser = fitted(4, kind="prefix-lm", mean_span=0.0, rate=0.0)
    inputs, targets = denoiser.hide(Fixed(0), 0, text, range(0))
    assert (inputs.tolist(), targets.tolist()) == ([7, 8, 20], [21, 22, 23])
    top = (1 << 64) - 1
    assert [random_split(w, 4) for w in (0, top // 3, top // 3 + 1, top)] == [1, 1, 2, 3]


def test_splits_are_uniform() -> None:
    words = sample_rng(4, "split").words(0, 0, 100_000).tolist()
    counts = Counter(random_split(word, 5) for word in words)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(n - 25_000) < 4.5 * np.sqrt(100_000 * 3 / 16) for n in counts.values())


def taken_apart(row: Row) -> tuple[int, list[int], list[int]]:
    """The denoiser, and inputs and targets without prefix and ends."""
    tokens, labels, mask = row
    assert labels[:-1] == tokens[1:]
    counted = [t for t, m in zip(labels, mask, strict=True) if m]
    first = mask.index(1.0)
    assert mask == [0.0] * first + [1.0] * len(counted) + [0.0] * (64 - first - len(counted))
    assert tokens[first] == counted[-1] == EOD
    assert not any(tokens[first + 1 + len(counted) :])
    prefixes = {7: [7, 8], 9: [9], 6: [6]}
    prefix = prefixes[tokens[0]]
    assert tokens[: len(prefix)] == prefix
    return [7, 9, 6].index(tokens[0]), tokens[len(prefix) : first], counted[:-1]


def plain(kind: int, inputs: list[int], targets: list[int]) -> list[int]:
    """The text that was hidden in part."""
    if kind == 2:
        return inputs + targets
    marks = [t for t in inputs if t >= VOCAB - EXTRA]
    assert marks == [t for t in targets if t >= VOCAB - EXTRA]
    assert marks == list(range(VOCAB - 1, VOCAB - 1 - len(marks), -1))
    assert targets[0] == marks[0]
    text, rest = [], targets[1:]
    for token in inputs:
        if token not in marks:
            text.append(token)
            continue
        stop = next((i for i, t in enumerate(rest) if t in marks), len(rest))
        assert stop >= 1
        text += rest[:stop]
        rest = rest[stop + 1 :]
    return text


def dataset_of(prefix: str, mixture: str, samples: int) -> Any:
    """The data set itself, without blending and batches."""
    config = objective_config(prefix, **SETTINGS, ul2_mixture=mixture)
    blend = Blend(flag="--data-path", prefixes=(prefix,), weights=None, bounds=(0.0, 1.0))
    sources = {prefix: inspect_source(prefix)}
    return build_split("train", blend, samples, config, build_tokenizer(config.data), sources)


def test_the_documents_come_back(corpus: tuple[str, str], tmp_path: Path) -> None:
    """The texts of all windows, in the windows' order, are the documents one after the other."""
    documents = [[*range(10 + 30 * i, 10 + 30 * i + i), EOD] for i in range(25)]
    dataset = dataset_of(write(tmp_path / "y", documents), corpus[1], 30)
    assert len(dataset) >= 30
    texts: dict[int, list[int]] = {}
    for i, window in enumerate(dataset.windows.order.tolist()):
        sample = dataset[i]
        row = tuple(sample[name].tolist() for name in ("tokens", "labels", "loss_mask"))
        texts[window] = plain(*taken_apart(row))
    stream = [t for window in sorted(texts) for t in texts[window]]
    joined = [t for d in dataset.windows.documents.tolist() for t in documents[d]]
    assert len(stream) > 3 * sum(map(len, documents))
    assert stream == joined[: len(stream)]


def test_lengths_fill_their_parts(corpus: tuple[str, str]) -> None:
    found = [taken_apart(row) for row in rows(ul2(corpus, train_iters=40).train)]
    by_kind = {kind: [f for f in found if f[0] == kind] for kind in range(3)}
    assert all(len(group) > 40 for group in by_kind.values())
    # "7 8" and 32 of text, 5 hidden in 2 spans: 2 + 27 + 2 + 1 = 32; 33 of text would be one more
    assert {(len(i), len(t)) for _, i, t in by_kind[0]} == {(29, 7)}
    # "9" and 40 of text, 20 hidden in 10 spans: 1 + 20 + 10 + 1 = 32
    assert {(len(i), len(t)) for _, i, t in by_kind[1]} == {(30, 30)}
    assert {len(i) + len(t) for _, i, t in by_kind[2]} == {31}
    splits = {len(i) for _, i, _ in by_kind[2]}
    assert min(splits) >= 1
    assert max(splits) <= 30
    assert len(splits) > 20


def test_full_rows(corpus: tuple[str, str]) -> None:
    for row in rows(ul2(corpus, ul2_fill_rows=True, train_iters=10).train):
        used = row[2].index(1.0) + int(sum(row[2])) + 1
        assert 62 <= used <= 64
        plain(*taken_apart(row))


def test_shares(corpus: tuple[str, str]) -> None:
    data = ul2(corpus, train_iters=250)
    counts = Counter(taken_apart(row)[0] for row in rows(data.train))
    for kind, share in enumerate((0.25, 0.25, 0.5)):
        assert abs(counts[kind] / 2000 - share) < 4.5 * np.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 8), (2, 2), (8, 1)])
def test_the_same_in_every_layout(corpus: tuple[str, str], dp_size: int, micro: int) -> None:
    settings = {**SETTINGS, "ul2_mixture": corpus[1]}
    expected = order(corpus[0], dp_size=1, micro=2, **settings)
    assert len({tuple(tokens) for tokens, _, _ in expected}) == STEPS * GLOBAL
    assert order(corpus[0], dp_size=dp_size, micro=micro, **settings) == expected
    resumed = order(corpus[0], dp_size=dp_size, micro=micro, consumed=3 * GLOBAL, **settings)
    assert resumed == expected[3 * GLOBAL :]


def test_the_same_from_workers_and_in_a_longer_run(corpus: tuple[str, str]) -> None:
    expected = rows(ul2(corpus).train)
    assert rows(ul2(corpus, num_workers=2).train) == expected
    assert rows(ul2(corpus, train_iters=200).train)[: len(expected)] == expected
    assert rows(ul2(corpus, seed=99).train) != expected


def test_evaluation_has_the_same_noise_each_time(corpus: tuple[str, str]) -> None:
    data = ul2(corpus, split="7,2,1")
    assert rows(data.valid()) == rows(data.valid())


def test_sources_have_random_numbers_of_their_own(corpus: tuple[str, str], tmp_path: Path) -> None:
    other = write(tmp_path / "z", [[i % 980 + 10 for i in d[:-1]] for d in random_documents(90, 5)])
    first, second = (dataset_of(p, corpus[1], 60).windows.kinds[:60] for p in (corpus[0], other))
    assert 10 < (first != second).sum() < 55


def test_identity(corpus: tuple[str, str], tmp_path: Path) -> None:
    base = ul2(corpus).fingerprint
    moved = tmp_path / "same.toml"
    moved.write_text(MIXTURE)
    assert ul2((corpus[0], str(moved))).fingerprint == base
    moved.write_text(MIXTURE.replace("0.15", "0.2"))
    assert ul2((corpus[0], str(moved))).fingerprint != base
    for change in ({"ul2_fill_rows": True}, {"ul2_inputs_length": 40}, {"objective": "causal"}):
        assert ul2(corpus, **change).fingerprint != base


REFUSED = {
    r"--vocab-extra-ids must be > 0 .*got 0": {"vocab_extra_ids": 0},
    r"--vocab-extra-ids must be >= 10, .*got 5": {"vocab_extra_ids": 5},
    r"--vocab-extra-ids must be >= 0 .*got -1": {"vocab_extra_ids": -1},
    r"--seq-length must be large enough for .*got 6": {"seq_length": 6},
    r"text for NullTokenizer must be .*got '\[NLU\] '": {"ul2_mixture": None},
    r"must be >= the tokenizer's 259 ids plus 50 extra ids": {
        "tokenizer_type": "ByteTokenizer",
        "vocab_size": 300,
    },
    r"must be >= 0 and <= 499": {"vocab_size": 550},
    "token id in document": {"vocab_extra_ids": 51},  # the end of a document would be a sentinel
}


@pytest.mark.parametrize("says", list(REFUSED))
def test_refused(corpus: tuple[str, str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        ul2(corpus, **REFUSED[says])
    assert re.search(says, str(caught.value))
    assert "\n" not in str(caught.value)


def test_sentinels_of_umt5() -> None:
    """300 extra ids after 256000 pieces: 256299 downwards."""
    config = objective_config(vocab_extra_ids=300, vocab_size=None).data
    ids = sentinel_ids(config, NullTokenizer(256000))
    assert (ids[0], ids[-1], len(ids)) == (256299, 256000, 300)
    assert unpadded_vocab_size(config, NullTokenizer(256000)) == 256300
    own = NullTokenizer(256300)
    own.extra_ids = 300
    assert sentinel_ids(objective_config().data, own) == ids
