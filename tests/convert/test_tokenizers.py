"""Tokenizer files beside weights: those that can be used go with the result, and no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import AutoTokenizer

from megatron_moe.config import DataConfig
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.modeling import FILES, TOKENIZER_CONFIG
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.files import files_of
from megatron_moe.training.inherited import read_settings, with_checkpoint_tokenizer
from tests.convert import cases
from tests.convert.cases import CONFIG, model_of
from tests.convert.exported import export
from tests.convert.test_llama_class import VOCAB, llama
from tests.data.pieces import train
from tests.tokenizer.test_gpt2_bpe import settings, write_files
from tools import generate
from tools.convert_checkpoint import main

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 4309802\n"
TIKTOKEN = "IQ== 0\nIg== 1\nIw== 2\n"
TEXTS = ["some words of text for pieces", "and a second line of words"] * 5


def convert(source: Path, target: str, to: Path, *words: str, load: str = "hf") -> None:
    flags = ["--from", load, "--load", str(source), "--to", target, "--save", str(to)]
    assert main([*flags, *words]) == 0


def pieces(file: Path, **ids: int) -> None:
    options: dict[str, Any] = {"byte_fallback": False, "hard_vocab_limit": False, **ids}
    train(file, TEXTS, vocab_size=VOCAB - 10, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "token" in path.name or "piece" in path.name}


def test_a_file_that_is_skipped_does_not_go_with_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    export(source, CONFIG)
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "a"))
    made.save(str(source / "tokenizer.json"))
    (source / "tokenizer.model").write_text(TIKTOKEN)
    code = "tokenization_openmoe.py"
    convert(source, "hf", tmp_path / "hf")
    assert names(tmp_path / "hf") == {"tokenizer.json", code}
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 2
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_text(LFS)
    capsys.readouterr()
    convert(source, "hf", tmp_path / "none")
    convert(source, "native", tmp_path / "native")
    assert capsys.readouterr().out.count("none that can be used") == 2
    assert names(tmp_path / "none") == {code}
    (step,) = (tmp_path / "native").glob("iter_*")
    assert names(step) == set()


def test_a_second_format_of_the_tokenizer_stays(tmp_path: Path) -> None:
    source = tmp_path / "source"
    export(source, CONFIG)
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")).save(
        str(source / "tokenizer.json")
    )
    pieces(source / "tokenizer.model")
    convert(source, "hf", tmp_path / "hf")
    assert names(tmp_path / "hf") >= {"tokenizer.json", "tokenizer.model"}


def test_llama_keeps_its_special_ids_through_a_native_checkpoint(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    pieces(tmp_path / "llama/tokenizer.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    convert(tmp_path / "llama", "native", tmp_path / "native")
    again = tmp_path / "again"
    convert(tmp_path / "native", "hf", again, "--architecture", "LlamaForCausalLM", load="native")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((again / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2), name


def test_a_configuration_that_names_our_class_brings_its_code(tmp_path: Path) -> None:
    source, out = tmp_path / "llama", tmp_path / "out"
    llama(source)
    pieces(source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (source / FILES[-1].name).write_bytes(FILES[-1].read_bytes())
    convert(source, "hf", out, "--architecture", "LlamaForCausalLM")
    assert [path.name for path in out.glob("*.py")] == [FILES[-1].name]
    _same_ids(out, source / "tokenizer.model")


def test_the_name_of_xlm_r_s_model_is_known(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    export(source, CONFIG)
    pieces(source / "sentencepiece.bpe.model")
    convert(source, "hf", out)
    assert (out / "tokenizer_config.json").exists()
    _same_ids(out, source / "sentencepiece.bpe.model")


def _same_ids(folder: Path, file: Path) -> None:
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(theirs).__name__ == "OpenMoeTokenizer"
    assert theirs(TEXTS[0])["input_ids"] == build_tokenizer(data).tokenize(TEXTS[0])


def test_gpt2_s_two_files_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that names them by paths of the directory of the run, used in another one."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "other").mkdir()
    files = write_files(tmp_path / "tok")
    tokenizer = build_tokenizer(settings(files))
    assert tokenizer.files == {path.name: path.read_bytes() for path in files[:2]}
    monkeypatch.setattr(cases, "VOCAB", 448)
    data = replace(settings(files), vocab_file="tok/vocab.json", merge_file="tok/merges.txt")
    model = replace(
        model_of(replace(CONFIG, data=data)),
        tokenizer_hash=tokenizer.identity,
        tokenizer_files=files_of(tmp_path / "tok")[1:],
    )
    native, again = tmp_path / "native", tmp_path / "again"
    write(model, ConversionTarget(format="native", path=native), lambda _: None)
    monkeypatch.chdir(tmp_path / "other")
    ask = ["--prompt", "Hello", "--max-new-tokens", "2", "--temperature", "0"]
    generate.main(["--load", str(native), *ask])
    expected = capsys.readouterr().out
    generate.main(["--load", str(native), *ask, "--tokenizer-model", str(tmp_path / "tok")])
    assert capsys.readouterr().out == expected
    (lone := tmp_path / "lone.model").touch()
    with pytest.raises(SystemExit):
        generate.main(["--load", str(native), *ask, "--tokenizer-model", str(lone)])
    assert "must be a folder with vocab.json and merges.txt" in capsys.readouterr().err
    convert(native, "native", again, load="native")
    (step,) = again.glob("iter_*")
    assert (step / "merges.txt").read_bytes() == files[1].read_bytes()
    assert "tokenizer: GPT2BPETokenizer" in capsys.readouterr().out
    run = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, load=str(again)))
    saved = read_settings(run.checkpoint)
    assert saved is not None and saved.config.data.vocab_file == str(step / "vocab.json")
    found, _ = with_checkpoint_tokenizer(run)
    assert build_tokenizer(found.data).identity == tokenizer.identity
