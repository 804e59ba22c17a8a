"""Perplexity of data, against plain forward passes over windows cut by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config import ObjectiveConfig
from megatron_moe.data.indexed.manifest import write_manifest
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import UsageError
from megatron_moe.inference import scoring
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.perplexity import Perplexity, evaluate_data
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.tokenizer.simple import ByteTokenizer
from tests.data.corpus import MANIFEST
from tests.inference.cases import CONFIG, DROPLESS, model

LENGTHS = [5, 1, 17, 30, 2, 11, 8]
"""74 tokens: four rows of 16 and one of 10."""


def _loaded(objective: ObjectiveConfig | None = None, factor: float | None = None) -> LoadedModel:
    moe = replace(DROPLESS, moe_eval_capacity_factor=factor)
    config = replace(CONFIG, moe=moe, objective=objective or ObjectiveConfig())
    text = TextTokenizer(ByteTokenizer(), CONFIG.data)
    return LoadedModel(model=model(moe), config=config, tokenizer=text, source="the case", step=7)


def _write(prefix: Path, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), 259) as writer:
        for length in lengths:
            writer.add_document([*draw.integers(3, 259, length - 1).tolist(), 1])
    return str(prefix)


def _stream(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[int]:
    draw = np.random.default_rng(seed)
    documents = ([*draw.integers(3, 259, length - 1).tolist(), 1] for length in lengths)
    return [i for document in documents for i in document]


def _cross_entropy(logits: Tensor, labels: Sequence[int]) -> float:
    probs = logits.double().softmax(dim=-1)
    return -sum(math.log(probs[place, label].item()) for place, label in enumerate(labels))


def _expected(ids: Sequence[int], length: int, factor: float | None = None) -> float:
    """Sum over all ids, in rows of ``length``, each alone."""
    made = model(replace(DROPLESS, moe_eval_capacity_factor=factor))
    stream = [1, *ids]
    total = 0.0
    for start in range(0, len(ids), length):
        row = stream[start : start + length + 1]
        output = made(torch.tensor([row[:-1]]), training_capacity=False)
        total += _cross_entropy(output.logits[0], row[1:])
    return total


def _one(loaded: LoadedModel, prefix: str, **more: int) -> Perplexity:
    settings = {"seq_length": 16, "batch_size": 3, **more}
    (found,) = evaluate_data(loaded, [prefix], **settings)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("at_once", [scoring.LOGITS, 384 * 7])
def test_every_token_counts_once(
    tmp_path: Path, batch_size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS", at_once)
    found = _one(_loaded(), _write(tmp_path / "data"), batch_size=batch_size)
    assert (found.name, found.tokens) == ("data", 74)
    expected = _expected(_stream(), 16) / 74
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert found.bits_per_byte is None


def test_a_capacity_is_of_each_row(tmp_path: Path) -> None:
    found = _one(_loaded(factor=0.5), _write(tmp_path / "data"))
    assert found.loss == pytest.approx(_expected(_stream(), 16, factor=0.5) / 74, rel=1e-5)
    assert found.loss != pytest.approx(_expected(_stream(), 16) / 74, rel=1e-3)


def test_the_first_tokens_alone_and_data_of_whole_rows(tmp_path: Path) -> None:
    prefix = _write(tmp_path / "data")
    for count in (1, 16, 20, 32, 64):
        found = _one(_loaded(), prefix, max_tokens=count)
        assert found.tokens == count
        expected = _expected(_stream()[:count], 16) / count
        assert found.loss == pytest.approx(expected, rel=1e-5)


def test_documents_are_kept_apart_if_the_run_kept_them_apart(tmp_path: Path) -> None:
    apart = ObjectiveConfig(reset_position_ids=True, reset_attention_mask=True)
    found = _one(_loaded(apart), _write(tmp_path / "data"), seq_length=40, max_tokens=40)
    # Every document with the end of the one before it, alone.
    made, stream, total, pieces = model(), [1, *_stream()[:40]], 0.0, []
    for token in stream[:-1]:
        if not pieces or pieces[-1][-1] == 1:
            pieces.append([])
        pieces[-1].append(token)
    place = 0
    for piece in pieces:
        logits = made(torch.tensor([piece]), training_capacity=False).logits[0]
        total += _cross_entropy(logits, stream[place + 1 : place + 1 + len(piece)])
        place += len(piece)
    assert found.loss == pytest.approx(total / 40, rel=1e-5)


def _manifest(prefix: str, tokens: int, text_bytes: int, domain: str | None = None) -> None:
    size = {"documents": 7, "sequences": 7, "tokens": tokens, "text_bytes": text_bytes}
    write_manifest(prefix, replace(MANIFEST, domain=domain, **size))


def test_bits_per_byte_where_the_bytes_are_known(tmp_path: Path) -> None:
    prefix = _write(tmp_path / "data")
    _manifest(prefix, tokens=74, text_bytes=67)
    found = _one(_loaded(), prefix)
    expected = _expected(_stream(), 16) / math.log(2) / 67
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_domains_and_their_mean(tmp_path: Path) -> None:
    one = _write(tmp_path / "one_text_document")
    other = _write(tmp_path / "other", [30, 9], seed=1)
    _manifest(one, 74, 67, domain="wiki")
    losses = {
        "wiki": _expected(_stream(), 16) / 74,
        "other": _expected(_stream([30, 9], 1), 16) / 39,
    }
    words = {"tokens": [one, other], "weights": ["3", one, "1", other]}
    means = {
        "tokens": (74 * losses["wiki"] + 39 * losses["other"]) / 113,
        "weights": 0.75 * losses["wiki"] + 0.25 * losses["other"],
    }
    for way, expected in means.items():
        found = evaluate_data(_loaded(), words[way], seq_length=16, batch_size=3)
        assert [each.name for each in found] == ["wiki", "other", "all"]
        assert [each.tokens for each in found] == [74, 39, 113]
        assert [each.loss for each in found[:2]] == pytest.approx(list(losses.values()), rel=1e-5)
        assert found[2].loss == pytest.approx(expected, rel=1e-5)
        shares = [each.weight for each in found]
        assert shares == ([0.75, 0.25, None] if way == "weights" else [None] * 3)


def test_wrong_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none"):
        _one(_loaded(), str(tmp_path / "none"))
    prefix = str(tmp_path / "other")
    with IndexedWriter(prefix, 500) as writer:
        writer.add_document([5, 6, 259, 1])
    with pytest.raises(UsageError, match=r"token 2 of .*other must be from 0 to 258.* \(got 259\)"):
        _one(_loaded(), prefix)
    fine = _write(tmp_path / "fine")
    _manifest(fine, 74, 67)
    path = Path(f"{fine}.json")
    path.write_text(path.read_text().replace("bytes+3", "another"))
    with pytest.raises(UsageError, match="tokenizer of"):
        _one(_loaded(), fine)
