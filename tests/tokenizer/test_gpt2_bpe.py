"""GPT-2's two files: the ids of transformers' own GPT-2 tokenizer and of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import NO_ID
from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size

END = "<|endoftext|>"
TEXTS = [
    "Hello world, hello again: it's 2026 and they've 1,000,000 tokens!",
    "  leading, trailing  \n\n\ttabs\r\nand lines ",
    "Grüße, naïve café — 日本語のテキスト 한국어 العربية 🙂🇩🇪",
    "def f(x):\n    return x**2  # code\n",
    "a\u2028b\u0085c\u00a0d\u200be \x00\x01",
    "",
    " ",
]


def write_files(folder: Path) -> tuple[Path, Path, Path]:
    """A small BPE of the tests' own texts: GPT-2's two files, and the same as a tokenizer.json."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    vocabulary = json.loads(model.to_str())["model"]["vocab"]
    merges = json.loads(model.to_str())["model"]["merges"]
    vocabulary[END] = len(vocabulary)
    vocab, merge, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    vocab.write_text(json.dumps(vocabulary))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    merge.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    model.add_special_tokens([END])
    model.save(str(whole))
    return vocab, merge, whole


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, Path]:
    return write_files(tmp_path_factory.mktemp("gpt2"))


def settings(files: tuple[Path, Path, Path]) -> DataConfig:
    vocab, merge, _ = files
    return DataConfig(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocab), merge_file=str(merge)
    )


def test_ids_are_those_of_transformers_and_of_a_tokenizer_json(files) -> None:
    vocab, merge, whole = files
    ours = build_tokenizer(settings(files))
    theirs = GPT2Tokenizer(vocab=str(vocab), merges=str(merge))
    same = build_tokenizer(
        DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(whole))
    )
    merged = 0
    for text in TEXTS:
        ids = ours.tokenize(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ids == same.tokenize(text) == ours.encode(text.encode()).tolist()
        assert ours.detokenize(ids) == text
        merged += len(text.encode()) - len(ids)
    assert merged > 50, "the merges are used"


def test_the_end_of_documents_is_a_token_of_its_own_and_never_text(files) -> None:
    ours = build_tokenizer(settings(files))
    assert ours.eod == json.loads(files[0].read_text())[END] == ours.vocab_size - 1
    assert (ours.pad, ours.unk) == (NO_ID, NO_ID)
    spelled = ours.tokenize(f"a {END} b")
    assert ours.eod not in spelled
    assert ours.detokenize([*spelled, ours.eod, ours.vocab_size + 3]) == f"a {END} b"


def test_the_identity_is_that_of_the_content(files, tmp_path: Path) -> None:
    vocab, merge, _ = files
    ours = build_tokenizer(settings(files))
    copy = tmp_path / "merges.txt"
    lines = merge.read_text(encoding="utf-8").split("\n")[1:]
    copy.write_text("\r\n".join(lines), encoding="utf-8")  # without the first line, from Windows
    assert build_tokenizer(settings((vocab, copy, copy))).identity == ours.identity
    copy.write_text("\n".join(lines[:-2]), encoding="utf-8")
    assert build_tokenizer(settings((vocab, copy, copy))).identity != ours.identity


def test_broken_files_are_one_line(files, tmp_path: Path) -> None:
    vocab, merge, whole = files
    none = tmp_path / "none"
    (half := tmp_path / "half.json").write_text('{"a": 0, "b"')
    (other := tmp_path / "other.json").write_text('{"a": 0}')
    (words := tmp_path / "words.txt").write_text("#version: 0.2\na b c\n")
    (unknown := tmp_path / "unknown.txt").write_text("#version: 0.2\n\nxq zq\n")
    for pair, expected in {
        (none, merge): f"--vocab-file must be a readable text file (got '{none}')",
        (half, merge): f"--vocab-file must be GPT-2's vocab.json, a JSON object of pieces and ids"
        f" (got '{half}')",
        (whole, merge): "--vocab-file must be GPT-2's vocab.json",
        (other, merge): f"--vocab-file must be a vocabulary with {END}",
        (vocab, none): f"--merge-file must be a readable text file (got '{none}')",
        (vocab, words): f"line 2 of --merge-file {words} must be GPT-2's merges.txt",
        (vocab, unknown): f"line 3 of --merge-file {unknown} must be GPT-2's merges.txt",
        (vocab, vocab): f"line 1 of --merge-file {vocab} must be GPT-2's merges.txt",
    }.items():
        with pytest.raises(UsageError) as error:
            build_tokenizer(settings((*pair, pair[0])))
        assert expected in str(error.value)


def test_each_family_takes_its_own_files() -> None:
    wrong = {
        "--vocab-file must be a file of GPT-2's tokenizer": DataConfig(
            tokenizer_type="GPT2BPETokenizer", merge_file="m"
        ),
        "--merge-file must be a file of GPT-2's tokenizer": DataConfig(
            tokenizer_type="GPT2BPETokenizer", vocab_file="v"
        ),
        "--vocab-file must be used with --tokenizer-type GPT2BPETokenizer (got 'v')": DataConfig(
            tokenizer_type="ByteTokenizer", vocab_file="v"
        ),
    }
    for expected, data in wrong.items():
        with pytest.raises(UsageError) as error:
            build_tokenizer(data)
        assert expected in str(error.value)


def test_the_padded_size_is_taken_as_it_is() -> None:
    data = DataConfig(tokenizer_type="ByteTokenizer", padded_vocab_size=1001)
    assert padded_vocab_size(data, build_tokenizer(data)) == 1001
    exact = DataConfig(tokenizer_type="ByteTokenizer", padded_vocab_size=259)
    assert padded_vocab_size(exact, build_tokenizer(exact)) == 259
    small = DataConfig(tokenizer_type="ByteTokenizer", vocab_size=300, padded_vocab_size=299)
    with pytest.raises(UsageError, match=r"--padded-vocab-size must be >= the 300 ids"):
        padded_vocab_size(small, build_tokenizer(small))
