"""The trained tokenizer: umT5's special ids, exact round trips, the same model each time."""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from megatron_moe.config import DataConfig
from megatron_moe.tokenizer.build import build_tokenizer
from tools.train_tokenizer import Corpus, cut_text, main


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
    corpus = Corpus(paths, "text", 20_000)
    pieces = list(corpus.sentences())
    counts = {name: sum(piece.count(name) for piece in pieces) for name in "ab"}
    assert counts == {"a": 10_000, "b": 10_000}
    assert max(map(len, pieces)) <= 2048
    assert corpus.unread == paths
    corpus = Corpus(paths, "text", 1e9)
    assert sum(map(len, corpus.sentences())) == 100_000
    assert corpus.unread == []


@pytest.mark.parametrize("character", "aé日😀")
def test_sentences_fit_the_trainer_and_lose_nothing(character: str) -> None:
    """SentencePiece leaves out sentences of more than 4192 bytes."""
    text = "".join(f"{character * 9}{i}" for i in range(900))
    pieces = list(cut_text(text))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 4192
    assert max(map(len, pieces)) <= 2048
    assert min(len(piece) for piece in pieces[:-1]) > 1000
    if character == "a":
        assert [len(piece) for piece in pieces[:2]] == [2048, 2048], "as in earlier versions"


def chinese(documents: int, length: int = 4096) -> str:
    """JSON Lines of long documents in 60 characters, in which some pairs are frequent."""
    draw = random.Random(1)
    words = [chr(0x4E00 + a) + chr(0x4E00 + a + 1) for a in range(0, 60, 2)]
    texts = ("".join(draw.choices(words, k=length // 2)) for _ in range(documents))
    return "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)


def test_long_chinese_documents_get_pieces(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces of 2048 such characters have 6144 bytes, which the trainer would leave out."""
    (tmp_path / "zh.jsonl").write_text(chinese(6), encoding="utf-8")
    path = tmp_path / "t.model"
    words = ["--input", str(corpus), f"{tmp_path}/zh.jsonl", "--output", str(path)]
    main([*words, "--vocab-size", "700", "--character-coverage", "0.999"])
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [loaded.id_to_piece(i) for i in range(700)]
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in piece) for piece in pieces) >= 60
    text = json.loads((tmp_path / "zh.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    ids = loaded.encode(text)
    assert not any(loaded.is_byte(i) for i in ids)
    assert len(ids) < len(text), "some pairs are pieces"
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    (han,) = [line for line in table if line[0] == "Han"]
    assert han[2] == "0.00%"
    assert float(han[3]) < 1
    assert {"Latin", "Common"} <= {line[0] for line in table}


def test_what_is_left_out_is_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rare characters of a script, a character that the trainer reserves, the end of a file."""
    lines = ["bars \u2585\u2585 beside sesame"] * 40 + [chr(0x0E01 + i) * 3 for i in range(40)]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "b.jsonl").write_text(text)
    words = ["--input", str(corpus), f"{tmp_path}/b.jsonl", "--output", f"{tmp_path}/t.model"]
    main([*words, "--vocab-size", "420", "--megabytes", "0.06", "--character-coverage", "0.99"])
    said = capsys.readouterr()
    corpus_of_bars = Corpus([f"{tmp_path}/b.jsonl"], "text", 1e6)
    sentences = list(corpus_of_bars.sentences())
    assert sentences[:2] == ["bars ", " beside sesame"], "the text around it is used"
    loaded = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/t.model")
    pieces = "".join(loaded.id_to_piece(i) for i in range(420))
    assert "\u2585" not in pieces
    assert loaded.decode(loaded.encode("a \u2585")) == "a \u2585"
    thai = sum(chr(0x0E01 + i) not in pieces for i in range(40)) / 40
    assert thai > 0.5, "the case has no rare characters"
    warnings = said.err.replace("\r", "\n")
    assert f"{thai:.1%} of the Thai characters have no piece and are encoded as bytes" in warnings
    assert "U+2585, which SentencePiece reserves, was left out 80 times" in warnings
    assert f"only the beginning was read (--megabytes) of {corpus}\n" in warnings
    (row,) = [line.split() for line in said.out.splitlines() if line.startswith("Thai")]
    assert row[2] == f"{thai:.2%}"
    assert float(row[4]) == pytest.approx(3 * thai, abs=0.01), "three bytes a character"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ["--vocab-size", "90000"],
            "the pieces that this text can fill (got 90000); or train on more text (--megabytes)",
        ),
        (
            ["--input", "/no/such"],
            "--input must be a readable file or a glob that matches files (got '/no/such')",
        ),
        (["--json-key", "body"], "error: --json-key body in line 1 of"),
        (
            ["--vocab-size", "100"],
            "and bytes that every model of this text has (got 100)",
        ),
        (["--vocab-size", "0"], "--vocab-size must be >= 1 (got 0)"),
        (["--megabytes", "0"], "--megabytes must be > 0 (got 0.0)"),
        (
            ["--character-coverage", "0.5"],
            "coverage must be >= 0.98 and <= 1 (got 0.5)",
        ),
        (["--input", "EMPTY"], "--input must be one or more documents with text in 'text'"),
        (["--input", "BAD"], "error: --json-key text in line 31 of "),
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
    bad, empty = (corpus.parent / f"{name}.jsonl" for name in ("bad", "empty"))
    bad.write_text('{"text": "some words to train on"}\n' * 30 + '{"txt": "no text here"}\n')
    empty.write_text('{"text": ""}\n')
    change = [{"BAD": str(bad), "EMPTY": str(empty)}.get(word, word) for word in change]
    base = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "400"]
    with pytest.raises(SystemExit) as caught:
        main([*base, *change])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("train_tokenizer.py: error: ")
    assert says in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
