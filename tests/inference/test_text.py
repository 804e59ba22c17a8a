"""Text that can be read: in parts as it comes, and with sentinels."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import sentencepiece

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.inference.generation import GeneratedToken
from megatron_moe.inference.output import ContinuationPrinter, OutputStyle
from megatron_moe.inference.text import DecodeStream, TextTokenizer
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.simple import ByteTokenizer, NullTokenizer
from tests.data.pieces import train
from tests.tokenizer.test_huggingface import make

BYTES = DataConfig(tokenizer_type="ByteTokenizer")
SENTENCE = "naïve 日本語 😀, and  then:\n\tmore"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of tokenizer that has text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pieces = train(
        folder / "pieces.model",
        (f"word{i} and the other wörds{i % 7} of {i * i}" for i in range(300)),
        vocab_size=380,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    added = DataConfig(**{**vars(pieces), "vocab_extra_ids": 5})
    byte_level = DataConfig(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(make(folder, ["<pad>", "</s>", "<unk>"])),
    )
    configs = {"bytes": BYTES, "pieces": pieces, "sentinels": added, "byte level": byte_level}
    made = {name: TextTokenizer(build_tokenizer(data), data) for name, data in configs.items()}
    return {"model": folder / "pieces.model", **made}


KINDS = ("bytes", "pieces", "sentinels", "byte level")


def _streamed(text: TextTokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    stream = DecodeStream(text, prompt)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "the other"])
def test_parts_are_the_text_and_hold_no_half_characters(
    texts: dict[str, Any], kind: str, prompt: str
) -> None:
    text = texts[kind]
    before, ids = text.encode(prompt), text.encode(SENTENCE)
    parts = _streamed(text, ids, before)
    whole = text.decode([*before, *ids])
    assert "".join(parts) == whole[len(text.decode(before)) :]
    assert SENTENCE in whole
    assert not any("\ufffd" in part for part in parts)
    assert sum(map(bool, parts)) > 10, "text must come as it is made"


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_ids_are_their_text(texts: dict[str, Any], kind: str) -> None:
    # Half characters, special ids and sentinels anywhere: what a young model says.
    text = texts[kind]
    for seed in range(200):
        drawn = random.Random(seed)
        ids = [drawn.randrange(text.size) for _ in range(30)]
        assert "".join(_streamed(text, ids, [])) == text.decode(ids)
        assert (
            "".join(_streamed(text, ids[9:], ids[:9]))
            == text.decode(ids)[len(text.decode(ids[:9])) :]
        )


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    stream = DecodeStream(TextTokenizer(ByteTokenizer(), BYTES))
    assert len("".join(stream.push(0x80 + 3) for _ in range(20))) == 17
    assert stream.finish() == "\ufffd" * 3


def test_sentinels_are_written_and_read(texts: dict[str, Any]) -> None:
    text = texts["sentinels"]
    ids = text.encode("the <extra_id_0> words<extra_id_4>")
    # The first sentinel is the highest id, as in T5.
    assert text.size == 385
    assert [i for i in ids if i >= 380] == [384, 380]
    assert text.decode(ids).split() == ["the", "<extra_id_0>", "words<extra_id_4>"]
    with pytest.raises(UsageError, match=r"must be <= <extra_id_4> \(got .<extra_id_5>"):
        text.encode("<extra_id_5>")


def test_a_blank_after_a_sentinel_stays(texts: dict[str, Any]) -> None:
    text = texts["sentinels"]
    ids = text.base.tokenize("the words")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(texts["model"])).id_to_piece(ids)
    cut = max(i for i, piece in enumerate(pieces) if piece.startswith("▁"))
    assert text.decode([*ids[:cut], 384, *ids[cut:]]) == "the<extra_id_0> words"


def test_without_sentinels_their_names_are_text() -> None:
    text = TextTokenizer(ByteTokenizer(), BYTES)
    assert text.decode(text.encode("<extra_id_0>")) == "<extra_id_0>"
    assert len(text.encode("<extra_id_0>")) == 12


@pytest.mark.parametrize("echo", [True, False])
def test_an_answer_is_a_text_of_its_own_and_a_continuation_is_not(
    texts: dict[str, Any], echo: bool
) -> None:
    text, to = texts["pieces"], io.StringIO()
    prompt, answer = text.encode("word1 and"), text.encode("the other")
    drawn = [GeneratedToken(0, token, None) for token in answer[:-1]] + [
        GeneratedToken(0, answer[-1], "length")
    ]
    output = ContinuationPrinter(["word1 and"], [prompt], text, OutputStyle(echo=echo), to=to)
    output.print(drawn)
    assert to.getvalue() == ("word1 and the other\n" if echo else "the other\n")
    assert output.continuations[0].text == (" the other" if echo else "the other")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [True, False])
def test_generated_text_cannot_control_a_terminal(stream: bool) -> None:
    """A model can write any bytes; a pipe gets them, and JSON has escapes of its own."""
    text = TextTokenizer(ByteTokenizer(), BYTES)
    prompt, answer = text.encode("a\x1b[2J"), text.encode("b\x1b]52;c;eA==\x07\n\tc")
    ends = [None] * (len(answer) - 1) + ["length"]
    for to, shown in ((_Terminal(), "a\\x1b[2Jb\\x1b]52;c;eA==\\x07\n\tc\n"), (io.StringIO(), "")):
        drawn = [GeneratedToken(0, *pair) for pair in zip(answer, ends, strict=True)]
        style = OutputStyle(stream=stream)
        ContinuationPrinter(["a\x1b[2J"], [prompt], text, style, to=to).print(drawn)
        assert to.getvalue() == (shown or "a\x1b[2Jb\x1b]52;c;eA==\x07\n\tc\n")


def test_pieces_for_tables(texts: dict[str, Any]) -> None:
    text = texts["sentinels"]
    blank, the, *_ = text.base.tokenize("the words")
    assert (text.piece(blank), text.piece(the)) == ("' '", "'the'")
    assert text.piece(384) == "'<extra_id_0>'"
    assert text.piece(text.eod) == "<1>"
    assert TextTokenizer(ByteTokenizer(), BYTES).piece(0xC3 + 3) == "<198>"


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    text = TextTokenizer(NullTokenizer(50), DataConfig(vocab_size=50))
    assert text.decode(text.encode("7 8")) == "7 8"
    for wrong in ("7 50", "-1"):
        with pytest.raises(UsageError, match="token id in a prompt must be from 0 to 49"):
            text.encode(wrong)
