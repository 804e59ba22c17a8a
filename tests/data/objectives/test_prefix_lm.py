"""Prefix LM and `--eod-mask-loss`: the causal samples with less loss."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.data.corpus import VOCAB, random_documents, write
from tests.data.objectives.runs import STEPS, data_of, order, rows


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("prefix") / "x", random_documents(200))


def test_loss_after_a_split_only(prefix: str) -> None:
    causal = rows(data_of(prefix, train_iters=100).train)
    split = rows(data_of(prefix, train_iters=100, objective="prefix-lm").train)
    assert [row[:2] for row in split] == [row[:2] for row in causal]
    lengths = Counter()
    for _, _, mask in split:
        first = mask.index(1.0)
        assert mask == [0.0] * first + [1.0] * (16 - first)
        lengths[first] += 1
    # 17 ids, of which 1 to 16 are the prefix: 0 to 15 labels are in it
    assert set(lengths) == set(range(16))
    assert all(abs(n - 50) < 4.5 * np.sqrt(50) for n in lengths.values())


def test_splits_in_every_layout(prefix: str) -> None:
    expected = order(prefix, dp_size=1, micro=2, objective="prefix-lm")
    assert order(prefix, dp_size=4, micro=1, objective="prefix-lm") == expected
    later = order(prefix, dp_size=2, micro=2, consumed=16, objective="prefix-lm")
    assert later == expected[16:]
    assert rows(data_of(prefix, num_workers=2, objective="prefix-lm").train) == expected


@pytest.mark.parametrize("objective", ["causal", "prefix-lm"])
def test_no_loss_after_an_end_of_document(prefix: str, objective: str) -> None:
    plain = rows(data_of(prefix, objective=objective).train)
    masked = rows(data_of(prefix, objective=objective, eod_mask_loss=True).train)
    ends = 0
    for (tokens, labels, before), row in zip(plain, masked, strict=True):
        expected = [0.0 if t == VOCAB - 1 else m for t, m in zip(tokens, before, strict=True)]
        assert row == (tokens, labels, expected)
        ends += tokens.count(VOCAB - 1)
    assert ends > STEPS


def test_identity(prefix: str) -> None:
    """Causal runs keep the identity that they had before there were objectives."""
    causal = data_of(prefix).identity
    assert "objective" not in causal
    changes = [{"objective": "prefix-lm"}, {"eod_mask_loss": True}]
    changes.append({"objective": "prefix-lm", "eod_mask_loss": True})
    prints = {data_of(prefix, **change).fingerprint for change in [{}, *changes]}
    assert len(prints) == 4
