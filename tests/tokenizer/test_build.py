"""Tokenizers: special ids, round trips, vocabulary sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import (
    build_tokenizer,
    padded_vocab_size,
    sentinel_ids,
    unpadded_vocab_size,
)
from megatron_moe.tokenizer.simple import ByteTokenizer, NullTokenizer
from tests.data import pieces

TEXTS = ["", "plain words", "  two\n\n\tlines \r\n", "naïve 日本語 😀", "a</s>b<pad>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"word{i} and wörd{i % 7} of {i * i}" for i in range(500)]
    path = tmp_path_factory.mktemp("model") / "t.model"
    pieces.train(
        path,
        words,
        vocab_size=400,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    return path


def test_sentencepiece_against_the_library(model: Path) -> None:
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (tokenizer.pad, tokenizer.eod, tokenizer.unk) == (0, 1, 2)
    assert tokenizer.vocab_size == reference.get_piece_size() == 400
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert ids == reference.encode(text)
        assert tokenizer.detokenize(ids) == text
        assert not {tokenizer.pad, tokenizer.eod} & set(ids)
    padded = [*tokenizer.tokenize("word1"), 400, 511]
    assert tokenizer.detokenize(padded).startswith("word1")


def test_arrays_equal_lists(model: Path) -> None:
    for tokenizer in (
        build_tokenizer(
            DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
        ),
        ByteTokenizer(),
    ):
        for text in TEXTS:
            ids = tokenizer.encode(text.encode())
            assert ids.dtype == "int32"
            assert ids.tolist() == tokenizer.tokenize(text)


def test_umt5s_extra_ids(model: Path, tmp_path: Path) -> None:
    """300 sentinels after the model's own ids, the first the highest; padded to a multiple."""
    data = DataConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model), vocab_extra_ids=300
    )
    tokenizer = build_tokenizer(data)
    assert unpadded_vocab_size(data, tokenizer) == 700
    assert padded_vocab_size(data, tokenizer) == 768
    assert sentinel_ids(data, tokenizer) == range(699, 399, -1)
    umt5 = replace(data, tokenizer_type="NullTokenizer", vocab_size=256300)
    assert sentinel_ids(umt5, build_tokenizer(umt5))[0] == 256299
    assert padded_vocab_size(umt5, build_tokenizer(umt5)) == 256384


def test_sentinels_inside_the_model(tmp_path: Path) -> None:
    """A model whose last pieces are T5's sentinels needs no extra ids."""
    path = tmp_path / "t.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of text"] * 10),
            model_writer=stream,
            model_type="char",
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    proto = messages.ModelProto.FromString(path.read_bytes())
    size = len(proto.pieces)
    for number in (2, 1, 0):
        proto.pieces.add(piece=f"<extra_id_{number}>", type=4)
    path.write_bytes(proto.SerializeToString())
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
    tokenizer = build_tokenizer(data)
    assert (tokenizer.vocab_size, tokenizer.extra_ids) == (size + 3, 3)
    assert sentinel_ids(data, tokenizer) == range(size + 2, size - 1, -1)


def test_identity_follows_the_model(model: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
        return build_tokenizer(data).identity

    copy = tmp_path / "moved.model"
    copy.write_bytes(model.read_bytes())
    assert identity(copy) == identity(model)
    changed = bytearray(model.read_bytes())
    place = changed.index(b"word")
    changed[place : place + 4] = b"WORD"
    copy.write_bytes(changed)
    assert identity(copy) != identity(model)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.tokenize("a\n é") == [100, 13, 35, 0xC3 + 3, 0xA9 + 3]
    assert tokenizer.vocab_size == 259
    for text in TEXTS:
        assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text
    assert tokenizer.detokenize([300]) == "?"


def test_null() -> None:
    tokenizer = NullTokenizer(10)
    assert tokenizer.tokenize("3 1\n4") == [3, 1, 4]
    assert tokenizer.detokenize([3, 1, 4]) == "3 1 4"
    assert (tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (9, -1, 10)
    with pytest.raises(UsageError, match="integers"):
        tokenizer.tokenize("three")


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "padded"),
    [(None, 128, 384), (259, 1, 259), (384, 128, 384), (385, 128, 512), (256384, 128, 256384)],
)
def test_padded_vocabulary(vocab_size: int | None, multiple: int, padded: int) -> None:
    data = DataConfig(
        tokenizer_type="ByteTokenizer", vocab_size=vocab_size, make_vocab_size_divisible_by=multiple
    )
    assert padded_vocab_size(data, ByteTokenizer()) == padded
    assert unpadded_vocab_size(data, ByteTokenizer()) == (vocab_size or 259)


@pytest.mark.parametrize(
    ("data", "flag"),
    [
        (
            DataConfig(tokenizer_type="ByteTokenizer", vocab_size=258),
            "--vocab-size must be >= the tokenizer's 259 ids (got 258)",
        ),
        (DataConfig(), "a tokenizer must be given (got None); add --tokenizer-type"),
        (
            DataConfig(tokenizer_type="SentencePieceTokenizer"),
            "--tokenizer-model must be a SentencePiece model file (got None)",
        ),
        (
            DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model="/no/such"),
            "--tokenizer-model must be a readable file (got '/no/such'); ",
        ),
        (
            DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=__file__),
            "--tokenizer-model must be a SentencePiece model (got ",
        ),
    ],
)
def test_refusals(data: DataConfig, flag: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_tokenizer(data)
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)


def test_divisor_must_be_positive() -> None:
    data = DataConfig(tokenizer_type="ByteTokenizer", make_vocab_size_divisible_by=0)
    with pytest.raises(UsageError, match="--make-vocab-size-divisible-by"):
        padded_vocab_size(data, ByteTokenizer())
