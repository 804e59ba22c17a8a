"""Commands print any name and text, whatever the encoding of standard output is."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pretrain_openmoe
from megatron_moe.console import escape_unprintable, for_stream
from tests.inference.cases import save
from tools import (
    evaluate,
    generate,
    inspect_checkpoint,
    inspect_data,
    merge_datasets,
    preprocess_data,
    train_tokenizer,
)

LATIN = os.fsdecode(b"caf\xe9")
"""A file name in Latin-1, as old file servers have."""
BYTES = ["--tokenizer-type", "ByteTokenizer"]


def printed(
    main: Callable[[Sequence[str]], object],
    words: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    encoding: str = "utf-8",
) -> str:
    """What a command prints on a stream that accepts valid text of the encoding only."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        main(words)
    return buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and its indexed data, all with a name that is not valid Unicode."""
    made = tmp_path_factory.mktemp("made") / LATIN
    made.mkdir()
    (made / "x.jsonl").write_text('{"text": "schön 日本"}\n' * 20, encoding="utf-8")
    words = ["--input", f"{made}/x.jsonl", "--output-prefix", f"{made}/x", *BYTES, "--append-eod"]
    preprocess_data.main(words)
    return made


def test_names_that_are_not_unicode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"{folder}/x_text_document"
    model = f"{folder}/t.model"
    trained = ["--input", f"{folder}/x.jsonl", "--output", model, "--vocab-size", "268"]
    config = ["--preset", "openmoe-tiny", "--describe", "--data-path", data, *BYTES]
    merged = ["--input", data, "--output-prefix", f"{folder}/merged"]
    again = ["--input", f"{folder}/x.jsonl", "--output-prefix", f"{folder}/again", *BYTES]
    for main, words in (
        (preprocess_data.main, again),
        (merge_datasets.main, merged),
        (inspect_data.main, [data]),
        (train_tokenizer.main, trained),
        (pretrain_openmoe.main, config),
    ):
        assert r"caf\udce9" in printed(main, words, monkeypatch), main


def test_text_where_the_locale_is_not_utf8(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"{folder}/x_text_document", "--document", "0", *BYTES]
    text = printed(inspect_data.main, words, monkeypatch, "ascii")
    assert text == "sch\\xf6n \\u65e5\\u672c\n"
    weights = str(save(tmp_path / "größe"))
    assert "gr\\xf6\\xdfe" in printed(inspect_checkpoint.main, [weights], monkeypatch, "ascii")
    words = ["--load", weights, "--prompt", "schön", "--max-new-tokens", "1", "--temperature", "0"]
    assert printed(generate.main, words, monkeypatch, "ascii").startswith("sch\\xf6n")
    assert printed(generate.main, words, monkeypatch, "latin-1").startswith("schön")
    data = ["--load", weights, "--data-path", f"{folder}/x_text_document", "--max-tokens", "20"]
    assert r"caf\udce9" in printed(evaluate.main, [*data, "--json"], monkeypatch)


def test_a_replaced_stream_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    escape_unprintable()
    print("日本")
    assert sys.stdout.getvalue() == "日本\n"  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_characters() -> None:
    """A title, a line that hides the one before, a C1 control, text in reverse."""
    text = "a\tb\nc\x1b]0;x\x07\rd\x9b2J\u202ee\x7f"
    shown = "a\tb\nc\\x1b]0;x\\x07\\rd\\x9b2J\\u202ee\\x7f"
    assert for_stream(text, Terminal()) == shown
    assert for_stream(text, io.StringIO()) == text
