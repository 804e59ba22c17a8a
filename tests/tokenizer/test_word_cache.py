"""The word cache gives what the library gives for whole texts, or is refused with a reason."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as messages

from megatron_moe.tokenizer import word_cache
from megatron_moe.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron_moe.tokenizer.word_cache import CLASSES, WordCache, word_pattern
from tests.data import pieces

SOURCES = sorted((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py"))
TEXTS = [path.read_text() for path in SOURCES]
ODD = [
    "",
    " ",
    "   \n\n \t  x",
    "a\u2581b \u2581 c",
    "naïve 日本語 😀 \x00 e\u0301   ",
    "-" * 100 + "=" * 77 + " " * 50 + "#",
    "0123 4.5e6 x1y2",
    "\r\n\r\n",
    "<extra> </s><pad>",
    "w" * 500,
]
LIKE_OURS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "user_defined_symbols": ["\n"],
}
"""As tools/train_tokenizer.py trains."""


def train(folder: Path, **options: Any) -> str:
    sentences = (text[i : i + 1000] for text in TEXTS for i in range(0, len(text), 1000))
    base = {"model_type": "bpe", "vocab_size": 700}
    pieces.train(folder / "t.model", sentences, **(base | LIKE_OURS | options))
    return str(folder / "t.model")


def soup(count: int) -> list[str]:
    """Texts of characters of all classes, with long runs."""
    rng = random.Random(0)
    letters = "  \n\n\tab0-=_é日\u2581"
    return [
        "".join(rng.choice(letters) * rng.choice([1, 1, 2, 9]) for _ in range(rng.randrange(60)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": True},
        {"user_defined_symbols": []},
        {"user_defined_symbols": ["\n", "<extra>", "=-"]},
        {"split_digits": False, "split_by_number": False},
        {"split_by_unicode_script": False},
        {"allow_whitespace_only_pieces": False},
    ],
    ids=str,
)
def test_equals_the_library(tmp_path: Path, options: dict[str, Any]) -> None:
    path = train(tmp_path, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.enable_word_cache() == ""
    for text in [*TEXTS, *ODD, *soup(2000), *TEXTS]:
        ids = tokenizer.encode(text.encode())
        assert ids.dtype == np.int32
        assert ids.tolist() == library.encode(text), text[:80]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not a byte-pair model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "spaces end its words"),
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalizer changes the text"),
        ({"remove_extra_whitespaces": True}, "its normalizer changes the text"),
        ({"user_defined_symbols": ["end of"]}, "pieces with a space after a letter"),
        ({"split_by_whitespace": False}, "pieces with a space after a"),
    ],
    ids=str,
)
def test_other_models_are_encoded_whole(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = train(tmp_path, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = SentencePieceTokenizer(path)
    assert reason in tokenizer.enable_word_cache()
    for text in [*TEXTS[:3], *ODD]:
        assert tokenizer.encode(text.encode()).tolist() == library.encode(text)


def test_unigram_words_depend_on_the_text_before(tmp_path: Path) -> None:
    """The reason for the refusal; if this fails, unigram models may have become cacheable."""
    path = train(tmp_path, model_type="unigram", vocab_size=1000)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    runs = ["-" * n for n in range(2, 80)] + ["=" * n for n in range(2, 80)]
    runs += [" " * n + "x" for n in range(2, 80)]
    alone = [model.encode("\n" + run) for run in runs]
    before = TEXTS[0] * 3
    start = len(model.encode(before))
    after = [model.encode(before + "\n" + run)[start:] for run in runs]
    assert [model.decode(ids) for ids in after] == ["\n" + run for run in runs]
    assert alone != after


def test_the_pattern_loses_nothing_and_follows_the_pieces() -> None:
    proto = messages.ModelProto()
    proto.trainer_spec.model_type = messages.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece in ("\u2581the", "\u2581\u2581", "('", "\n", "é1", "7"):
        proto.pieces.add(piece=piece, type=1)
    pattern = word_pattern(proto)
    assert isinstance(pattern, bytes)
    found = WordCache(lambda text: np.zeros(0, np.int32), pattern)
    text = "  the  ('é12 x\n\n3  \n.".encode()
    words = found._find(text)
    assert b"".join(words) == text
    assert words[:3] == [b"  the", b"  ", b"('"]
    assert words[3:6] == ["é12".encode(), b" x", b"\n"], "é1 is a piece, so they stay together"
    assert words[6:] == [b"\n", b"3", b"  ", b"\n", b"."]
    for left in CLASSES.values():
        for right in CLASSES.values():
            assert left is right or not set(bytes_of(left)) & set(bytes_of(right))
    assert sum(len(bytes_of(values)) for values in CLASSES.values()) == 256


def bytes_of(ranges: bytes) -> list[int]:
    return [i for i in range(256) if word_cache.re.fullmatch(b"[" + ranges + b"]", bytes([i]))]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_WORDS", 50)
    calls: list[bytes] = []

    def encode(text: bytes) -> np.ndarray:
        calls.append(text)
        return np.frombuffer(text, np.uint8).astype(np.int32)

    cache = WordCache(encode, rb"[^ ]+| ")
    for number in range(1000):
        text = b"w%d again again " % number + b"x" * 65
        assert cache.ids(text).tolist() == list(text)
        assert len(cache) <= 50
    assert b"x" * 65 not in cache, "long words are not kept"
    assert 1000 // 50 <= calls.count(b"again") <= 1000 // 40, "remembered between the new starts"
