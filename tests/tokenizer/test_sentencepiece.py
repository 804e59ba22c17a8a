"""Models with plain spaces give the library's ids, whatever their options, or there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages

from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.sentencepiece import SentencePieceTokenizer, with_plain_spaces
from tests.tokenizer.test_word_cache import ODD, TEXTS, soup, train

TIES = ["\n" + c * n for c in "-= " for n in range(2, 60)]
LONG = "\n".join(TEXTS * 2 + TIES)
"""Beyond the sum of scores at which the library begins anew from zero."""
UNIGRAM = {"model_type": "unigram", "vocab_size": 1000}


def edited(path: str, **changes: Any) -> str:
    """The model with pieces, by name, changed to another name or type."""
    proto = messages.ModelProto.FromString(Path(path).read_bytes())
    for piece in list(proto.pieces):
        change = changes.get(piece.piece)
        if isinstance(change, int):
            piece.type = change
        elif change is not None:
            piece.piece = change
    Path(path).write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": True},
        {"user_defined_symbols": []},
        {"user_defined_symbols": ["\n", "<extra>", "=-"]},
        {"byte_fallback": False},
        {"split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_equals_the_library(tmp_path: Path, options: dict[str, Any]) -> None:
    path = train(tmp_path, **UNIGRAM, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = SentencePieceTokenizer(path)
    tokenizer.enable_fast_encode()
    assert tokenizer._plain is not None
    for text in [*TEXTS, *ODD, *soup(1000), *TIES, LONG]:
        ids = tokenizer.encode(text.encode())
        assert ids.dtype == np.int32
        assert ids.tolist() == library.encode(text), text[:80]
    scores = library.get_score(library.encode(LONG))
    assert sum(scores) < -100_000


@pytest.mark.parametrize(
    ("options", "edits", "reason"),
    [
        ({"model_type": "bpe", "vocab_size": 700}, {}, "not a unigram model"),
        ({"user_defined_symbols": ["\u2581end"]}, {}, "a user-defined piece has a space"),
        ({}, {"\u2581": 5}, "a space alone is no piece"),
        ({}, {"\u2581of": " of"}, "pieces with plain spaces already"),
    ],
    ids=str,
)
def test_other_models_are_left_alone(
    tmp_path: Path, options: dict[str, Any], edits: dict[str, Any], reason: str
) -> None:
    path = edited(train(tmp_path, **UNIGRAM | options), **edits)
    found = with_plain_spaces(messages.ModelProto.FromString(Path(path).read_bytes()))
    assert isinstance(found, str)
    assert reason in found
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = SentencePieceTokenizer(path)
    tokenizer.enable_fast_encode()
    for text in [*TEXTS[:3], *ODD]:
        assert tokenizer.encode(text.encode()).tolist() == library.encode(text)


def test_a_normalizer_that_writes_the_sign_is_left_alone(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("41\t2581\n")
    path = train(tmp_path, **UNIGRAM, normalization_rule_tsv=str(rules))
    found = with_plain_spaces(messages.ModelProto.FromString(Path(path).read_bytes()))
    assert found == "its normalizer writes \u2581 itself"
    proto = messages.ModelProto.FromString(Path(train(tmp_path, **UNIGRAM)).read_bytes())
    proto.normalizer_spec.escape_whitespaces = False
    assert with_plain_spaces(proto) == "its spaces are plain already"


def test_pieces_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    """The library reads such a model, and fails at the first text that has the piece."""
    path = Path(train(tmp_path, **UNIGRAM))
    content = path.read_bytes()
    place = content.index(b"the")
    path.write_bytes(content[:place] + b"\xff\xfe\xfd" + content[place + 3 :])
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size() > 0
    with pytest.raises(UsageError, match=r"a model whose pieces are UTF-8 .*xff.xfe.xfd"):
        SentencePieceTokenizer(str(path))
