"""The trained tokenizer: umT5's special ids, exact round trips, the same model each time."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from megatron_moe.config import DataConfig
from megatron_moe.tokenizer.build import build_tokenizer
from tools.train_tokenizer import main, sentences


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "code.jsonl"
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py"))[:8]
    path.write_text("".join(json.dumps({"text": p.read_text()}) + "\n" for p in sources))
    return path


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    path = corpus.parent / "new" / "t.model"
    main(["--input", str(corpus), "--output", str(path), "--vocab-size", "1000"])
    return path


def test_special_ids_and_size(model: Path) -> None:
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (loaded.pad_id(), loaded.eos_id(), loaded.unk_id(), loaded.bos_id()) == (0, 1, 2, -1)
    assert loaded.get_piece_size() == 1000
    assert sum(loaded.is_byte(i) for i in range(1000)) == 256
    assert [path.name for path in model.parent.iterdir()] == ["t.model"]


def test_text_comes_back(model: Path, corpus: Path) -> None:
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    )
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    odd = ["\ta  b \r\n\n", "  lead", "日本語 😀 \x00 \ufeff", "ﬁ ½ e\u0301", "</s><pad>", ""]
    for text in texts + odd:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert not {0, 1, 2} & set(ids)
    assert sum(map(len, texts)) / sum(len(tokenizer.tokenize(t)) for t in texts) > 2


def test_byte_pairs_and_packed_input(corpus: Path, tmp_path: Path) -> None:
    """Any kind of input; the model is one that words can be remembered of, and text comes back."""
    packed = tmp_path / "code.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    path = tmp_path / "t.model"
    words = ["--model-type", "bpe", "--vocab-size", "1000"]
    main(["--input", str(packed), "--output", str(path), *words])
    tokenizer = build_tokenizer(
        DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
    )
    assert tokenizer.enable_word_cache() == ""
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    assert tokenizer.detokenize(tokenizer.encode(text.encode()).tolist()) == text


def test_same_model_each_time(model: Path, corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "t.model"
    main(["--input", str(corpus), "--output", str(again), "--vocab-size", "1000"])
    one, two = (
        [m.id_to_piece(i) for i in range(1000)]
        for m in (sentencepiece.SentencePieceProcessor(model_file=str(p)) for p in (model, again))
    )
    assert one == two


def test_files_share_the_sample(tmp_path: Path) -> None:
    for name in "ab":
        text = json.dumps({"text": name * 5000}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(text * 10)
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    pieces = list(sentences(paths, "text", 0.02))
    counts = {name: sum(piece.count(name) for piece in pieces) for name in "ab"}
    assert counts == {"a": 10_000, "b": 10_000}
    assert max(map(len, pieces)) <= 2048


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ["--vocab-size", "90000"],
            "--vocab-size must be a size that the text can fill (got 90000)",
        ),
        (
            ["--input", "/no/such"],
            "--input must be a readable file or a glob that matches files (got '/no/such')",
        ),
        (["--json-key", "body"], "--json-keys body, line 1 of"),
        (["--output", "/proc/no/t.model"], "/proc/no"),
    ],
)
def test_mistakes(
    corpus: Path,
    tmp_path: Path,
    change: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "400"]
    with pytest.raises(SystemExit) as caught:
        main([*base, *change])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("train_tokenizer.py: error: ")
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
