"""Files that are not the tokenizer they should be are named, in one line that says what to give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import vocabulary_of
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.files import candidates, files_in, files_of, settings_for, stored_name
from tests.data.pieces import train
from tests.tokenizer.test_huggingface import build, make

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 4309802\n"
SENTENCEPIECE, HUGGING_FACE = "SentencePieceTokenizer", "HuggingFaceTokenizer"


def _error(kind: str, path: Path | str) -> str:
    data = DataConfig(tokenizer_type=kind, tokenizer_model=str(path))  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        build_tokenizer(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [SENTENCEPIECE, HUGGING_FACE])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS.encode(), "it is a Git LFS pointer, not the file itself; get the file with git lfs"),
        (b"", "it is empty"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "it is a vocabulary of tiktoken"),
        (b"<!doctype html><html>", "it is an HTML page"),
        (b"#version: 0.2\n", "it begins with b'#version: 0.2"),
    ],
)
def test_other_files_are_named(tmp_path: Path, kind: str, content: bytes, says: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert says in _error(kind, path)


def test_each_type_names_the_other(tmp_path: Path) -> None:
    train(tmp_path / "a.model", ["a b c d e f g h"] * 9, vocab_size=12, byte_fallback=False)
    path = make(tmp_path, ["</s>"])
    assert f"--tokenizer-type {SENTENCEPIECE}" in _error(HUGGING_FACE, tmp_path / "a.model")
    assert f"--tokenizer-type {HUGGING_FACE}" in _error(SENTENCEPIECE, path)


@pytest.mark.parametrize("kind", [SENTENCEPIECE, HUGGING_FACE])
def test_folders_and_names_of_the_hub(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "gpt2" / name).write_text("{}")
    assert "GPT-2's vocab.json and merges.txt" in _error(kind, tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    assert "it is a folder that has no tokenizer file" in _error(kind, tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert "a name on the Hugging Face hub" in _error(kind, "google/umt5-small")
    assert "hub" not in _error(kind, "gpt2/none")  # a file that is missing in a folder that exists


def test_an_end_of_document_that_the_vocabulary_lacks_is_named(tmp_path: Path) -> None:
    names = {"eos_token": "<|im_end|>"}
    make(tmp_path, ["<|end_of_text|>", "<|eot_id|>"], tokenizer_config=names)
    said = _error(HUGGING_FACE, tmp_path)
    assert "must be a token of the vocabulary (got '<|im_end|>')" in said
    assert "its special tokens are <|end_of_text|>, <|eot_id|>" in said
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert build(tmp_path).eod == 0


def test_a_folder_with_a_sentencepiece_model_is_read(tmp_path: Path) -> None:
    data = train(tmp_path / "spiece.model", ["a b c d"] * 9, vocab_size=8, byte_fallback=False)
    folder = DataConfig(tokenizer_type=SENTENCEPIECE, tokenizer_model=str(tmp_path))
    assert build_tokenizer(folder).identity == build_tokenizer(data).identity


def test_names_in_a_checkpoint(tmp_path: Path) -> None:
    for name in ("umt5.model", "tokenizer.json", "tokenizer_config.json", "notes.json"):
        (tmp_path / name).touch()
    json_file = tmp_path / "tokenizer.json"
    assert files_in(tmp_path) == (json_file, tmp_path / "tokenizer_config.json")
    assert files_of(json_file) == files_in(tmp_path)
    assert files_of(tmp_path / "umt5.model") == (tmp_path / "umt5.model",)
    assert files_of(tmp_path / "none") == ()
    assert stored_name(tmp_path / "umt5.model") == "tokenizer.model"
    both = [*files_in(tmp_path), tmp_path / "umt5.model"]
    found = [(SENTENCEPIECE, tmp_path / "umt5.model"), (HUGGING_FACE, json_file)]
    assert list(candidates(both)) == found
    data = DataConfig(tokenizer_type=HUGGING_FACE, tokenizer_model="elsewhere")
    chosen = settings_for(data, both)
    assert chosen is not None and chosen.tokenizer_model == str(json_file)
    assert settings_for(DataConfig(tokenizer_type="ByteTokenizer"), both) is None


def test_special_tokens_in_text_are_text_unless_they_are_allowed(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["some words"] * 9, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    text = "a<|endoftext|>b<|im_start|>"
    plain, allowing = build(tmp_path), build(tmp_path, allow_special_tokens=True)
    for ids in (plain.tokenize(text), plain.encode(text.encode()).tolist()):
        assert not {0, 1} & set(ids)
        assert plain.detokenize(ids) == text
    a, b = plain.tokenize("a"), plain.tokenize("b")
    assert allowing.tokenize(text) == [*a, 0, *b, 1]
    assert allowing.encode(text.encode()).tolist() == [*a, 0, *b, 1]
    assert plain.eod == allowing.eod == 0
    # Text is read differently, but ids mean the same.
    assert plain.identity != allowing.identity
    assert vocabulary_of(plain.identity) == vocabulary_of(allowing.identity) == plain.identity
    data = DataConfig(tokenizer_type="ByteTokenizer", allow_special_tokens=True)
    with pytest.raises(UsageError, match="--allow-special-tokens must be used with --tokenizer"):
        build_tokenizer(data)
