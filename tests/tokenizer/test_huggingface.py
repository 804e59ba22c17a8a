"""`tokenizer.json` against the library itself: whole texts, special ids, nothing cut or added."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size, sentinel_ids

TEXTS = ["", "plain words", "  two\n\n\tlines \r\n", "naïve 日本語 😀", "word1 " * 3000]


def make(folder: Path, special: list[str], **beside: dict[str, Any]) -> Path:
    """A byte-level BPE that truncates, pads and adds tokens, as files in the wild do."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((f"word{i} and wörd{i % 7}" for i in range(300)), trainer)
    made.enable_truncation(8)
    made.enable_padding(length=8)
    if special:
        pair = [(special[0], made.token_to_id(special[0]))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=pair
        )
    made.save(str(folder / "tokenizer.json"))
    for name, values in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def build(path: Path, **more: Any) -> Any:
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path), **more)
    return build_tokenizer(data)


def test_against_the_library(tmp_path: Path) -> None:
    path = make(tmp_path, ["<pad>", "</s>", "<unk>"])
    library = tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    tokenizer = build(path)
    assert (tokenizer.pad, tokenizer.eod, tokenizer.unk) == (0, 1, 2)
    assert tokenizer.vocab_size == 400
    for text in TEXTS:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.tokenize(text) == expected
        assert tokenizer.encode(text.encode()).tolist() == expected
        assert tokenizer.detokenize([*expected, tokenizer.eod]) == text
    assert len(tokenizer.tokenize(TEXTS[-1])) > 8, "the file asks for truncation to 8"
    assert tokenizer.detokenize([999]) == "", "an id of the padded vocabulary"


def test_a_folder_and_the_identity(tmp_path: Path) -> None:
    path = make(tmp_path, ["<a>", "</s>"])
    assert build(tmp_path).identity == build(path).identity
    eod = build(path).eod
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<a>"}')
    assert build(path).eod != eod
    assert build(path).identity != build_identity_without(path, tmp_path)


def build_identity_without(path: Path, folder: Path) -> str:
    (folder / "tokenizer_config.json").unlink()
    return str(build(path).identity)


@pytest.mark.parametrize(
    ("special", "beside", "eod"),
    [
        (["<|endoftext|>"], {}, "<|endoftext|>"),
        (["</s>", "<end>"], {"tokenizer_config": {"eos_token": "<end>"}}, "<end>"),
        (["</s>", "<e>"], {"special_tokens_map": {"eos_token": {"content": "<e>"}}}, "<e>"),
        (["</s>"], {"tokenizer_config": {"eos_token": None, "model_max_length": 8}}, "</s>"),
    ],
)
def test_the_end_of_a_document(
    tmp_path: Path, special: list[str], beside: dict[str, Any], eod: str
) -> None:
    tokenizer = build(make(tmp_path, special, **beside))
    assert tokenizer.eod == special.index(eod)
    assert tokenizer.pad == -1


def test_sentinels_of_umt5(tmp_path: Path) -> None:
    """`<extra_id_0>` has the highest id, as in the file of umT5."""
    path = make(tmp_path, ["<pad>", "</s>", "<unk>"])
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens([AddedToken(f"<extra_id_{i}>") for i in range(299, -1, -1)])
    library.save(str(path))
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path))
    tokenizer = build_tokenizer(data)
    assert (tokenizer.vocab_size, tokenizer.extra_ids) == (700, 300)
    assert sentinel_ids(data, tokenizer) == range(699, 399, -1)
    assert library.id_to_token(699) == "<extra_id_0>"
    assert padded_vocab_size(data, tokenizer) == 768


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"must be a readable file \(got .*tokenizer\.json'\); "),
        ("{}", r"must be a tokenizer\.json \(got .*tokenizer\.json'\); "),
        ("not json", r"must be a tokenizer\.json \(got .*tokenizer\.json'\); "),
    ],
)
def test_bad_files(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        build(path)
    assert "\n" not in str(caught.value)


def test_marks_of_an_editor_change_nothing(tmp_path: Path) -> None:
    """A BOM begins both files."""
    beside = {"tokenizer_config": {"eos_token": "<two>"}}
    path = make(tmp_path, ["<one>", "<two>"], **beside)
    plain = build(path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = build(path)
    assert (marked.identity, marked.eod) == (plain.identity, plain.eod)
    assert marked.tokenize(TEXTS[1]) == plain.tokenize(TEXTS[1])


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    """It would be empty for the second process that reads it."""
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"--tokenizer-model must be a regular file .*named pipe"):
        build(path)
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
    with pytest.raises(UsageError, match=r"--tokenizer-model must be a regular file .*named pipe"):
        build_tokenizer(data)


def test_no_end_and_a_bad_neighbour(tmp_path: Path) -> None:
    path = make(tmp_path, ["<pad>"])
    with pytest.raises(UsageError, match="must be a tokenizer with an end-of-document token"):
        build(path)
    for content in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(
            UsageError, match=r"must be a JSON object \(got .*tokenizer_config\.json"
        ):
            build(path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UsageError, match=r"tokenizers installed \(got .*\); pip install 'megatron-moe\[data\]'"
    ):
        build(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=r"--tokenizer-model must be a tokenizer\.json.*got None"):
        build_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer"))
