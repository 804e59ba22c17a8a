"""The rows that are analysed, and errors about data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.sample import Sample, check_sample, read_sample
from megatron_moe.data.indexed.manifest import Manifest, write_manifest
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import UsageError
from tests.inference.cases import save

DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16, 17, 18, 19, 20]]


def _write(folder: Path, name: str, documents: list[list[int]] = DOCUMENTS) -> str:
    with IndexedWriter(str(folder / name), 300) as writer:
        for document in documents:
            writer.add_document(document)
    return str(folder / name)


def _sample(folder: Path, tokens: int | None = None, **more: int) -> Sample:
    words = [f"a={_write(folder, 'x')}", _write(folder, "b_text_document")]
    settings = {"seq_length": 4, "batch_size": 2, **more}
    return read_sample(words, tokens=tokens, **settings)


def test_every_row_with_its_next_tokens_documents_and_domain(tmp_path: Path) -> None:
    sample = _sample(tmp_path)
    assert sample.names == ("a", "b")
    batches = list(sample.batches())
    assert [batch.domain for batch in batches] == [0, 0, 1, 1]
    assert [batch.number for batch in batches] == list(range(4)) and sample.num_batches == 4
    first = batches[:2]
    tokens = np.concatenate([batch.tokens_BS for batch in first])
    # 20 tokens: the last row of four would need a twenty-first.
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    following = np.concatenate([batch.next_BS for batch in first])
    assert (following == tokens + 1).all()
    documents = np.concatenate([batch.documents_BS for batch in first]).ravel().tolist()
    assert documents == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4]
    assert sample.tokens == 32 and sample.vocabulary.tolist() == list(range(1, 18))


def test_fewer_rows_are_spread_over_the_file(tmp_path: Path) -> None:
    starts = _sample(tmp_path, tokens=8).domains[0].starts
    assert starts.tolist() == [0, 8]


def test_batches_from_the_middle_are_the_same(tmp_path: Path) -> None:
    sample = _sample(tmp_path)
    later = list(sample.batches(2))
    assert [batch.number for batch in later] == [2, 3]
    assert (later[0].tokens_BS == list(sample.batches())[2].tokens_BS).all()


def test_the_fingerprint_tells_samples_apart(tmp_path: Path) -> None:
    marks = {
        _sample(tmp_path).fingerprint,
        _sample(tmp_path, tokens=8).fingerprint,
        _sample(tmp_path, seq_length=3).fingerprint,
        read_sample([f"c={tmp_path / 'x'}"], tokens=None, seq_length=4, batch_size=2).fingerprint,
    }
    assert len(marks) == 4 and _sample(tmp_path).fingerprint in marks


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    prefix = _write(tmp_path, "short", [[1, 2, 3]])
    for words, length, said in (
        ([prefix], 4, "tokens of .*short must be > 4, one row"),
        ([f"a={prefix}", f"a={prefix}"], 2, "--data must be a name for each dataset"),
        ([str(tmp_path / "none")], 2, "data path"),
    ):
        with pytest.raises(UsageError, match=said):
            read_sample(words, tokens=None, seq_length=length, batch_size=2)


def test_data_that_a_model_cannot_read_is_named(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))  # 384 ids, rows of 40
    with IndexedWriter(str(tmp_path / "large"), 400) as writer:
        writer.add_document([399] * 60)
    for name, length, said in (
        ("large", 4, "largest token id of --data must be < 384"),
        ("large", 41, "--seq-length must be <= 40, the longest row"),
    ):
        sample = read_sample([str(tmp_path / name)], tokens=None, seq_length=length, batch_size=2)
        with pytest.raises(UsageError, match=said):
            check_sample(sample, model)


def test_data_of_another_tokenizer_is_named(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))
    assert model.tokenizer_hash
    sample = _sample(tmp_path)
    check_sample(sample, model)  # without a manifest nothing is known
    prefix = str(tmp_path / "x")
    manifest = Manifest(
        tokenizer="SentencePieceTokenizer",
        tokenizer_hash="another",
        vocab_size=300,
        key="text",
        append_eod=True,
        text_documents="file",
        domain=None,
        inputs=(),
        documents=5,
        sequences=5,
        tokens=20,
    )
    write_manifest(prefix, manifest)
    with pytest.raises(UsageError, match=r"tokenizer of .*x must be .*another"):
        check_sample(_reread(prefix), model)


def _reread(prefix: str) -> Sample:
    return read_sample([f"a={prefix}"], tokens=None, seq_length=4, batch_size=2)
