"""Text that other programs wrote: marks, encodings, line ends, surrogates."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.config.phases import read_phases
from megatron_moe.config.validate import validate
from megatron_moe.data.blend import blends_of
from megatron_moe.data.named_mixture import read_named_mixture
from megatron_moe.data.objectives.denoiser import OPENMOE, read_denoisers
from megatron_moe.errors import UsageError
from megatron_moe.inference.prompts import read_prompts
from megatron_moe.text import BOM, argument_text, decode, json_of_line, json_value, toml_value

MARK = "\ufeff".encode()
MIXTURE = '[domains]\nc = "C"\n[[source]]\ndomain = "c"\nprefix = "größe"\nweight = 1\n'
PHASES = '[[stage]]\nname = "größe"\n'
CONFIG = json.dumps({"data": {"tokenizer_model": "größe"}}, ensure_ascii=False)

READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--config": (CONFIG, RunConfig.load),
    "--phases": (PHASES, read_phases),
    "--mixture": (MIXTURE, lambda path: read_named_mixture(path, "root")),
    "--ul2-mixture": (OPENMOE.read_text(), read_denoisers),
    "--data-args-path": ("1 größe", lambda path: blends_of(DataConfig(data_args_path=path))),
    "--prompts-file": ("größe\ntwo\n", read_prompts),
}
"""A file for each flag that names one, and what reads it."""


@pytest.mark.parametrize("flag", READERS)
def test_the_mark_and_line_ends_of_an_editor_do_not_matter(tmp_path: Path, flag: str) -> None:
    content, read = READERS[flag]
    path = tmp_path / "a"
    path.write_bytes(content.encode())
    plain = read(str(path))
    path.write_bytes(MARK + content.encode().replace(b"\n", b"\r\n"))
    assert read(str(path)) == plain


@pytest.mark.parametrize("flag", READERS)
def test_other_encodings_are_named(tmp_path: Path, flag: str) -> None:
    content, read = READERS[flag]
    path = tmp_path / "a"
    path.write_bytes(content.encode("utf-16"))
    with pytest.raises(UsageError, match=r"must be UTF-8 \(got 'UTF-16'\); iconv -f UTF-16"):
        read(str(path))
    path.write_bytes(content.encode() + b"caf\xe9")
    with pytest.raises(UsageError, match=r"must be UTF-8 \(got b'\\xe9'\)"):
        read(str(path))


def test_the_place_of_an_undecodable_byte() -> None:
    with pytest.raises(UsageError, match=r"x must be UTF-8 .*; invalid .* at byte 8, on line 3$"):
        decode(b"one\ntwo\n\xe9a", "x")
    assert decode(b"one\0two", "x") == "one\0two", "zero bytes alone are no other encoding"


def test_json_that_only_python_would_accept_in_another_encoding() -> None:
    """`json.loads` guesses the encoding of bytes, and takes encoded surrogates."""
    for line in ('{"a": 1}'.encode("utf-16-be"), b'{"a": "\xed\xa0\xbd"}'):
        json.loads(line)
        with pytest.raises(UsageError, match="line 1 must be UTF-8"):
            json_of_line(line, "line 1")


def test_prompts_end_at_line_feeds_only(tmp_path: Path) -> None:
    prompts = ["def f():\x0c pass", "a\u2028b", "c\x85d", " e\tf ", "g\rh"]
    path = tmp_path / "p.txt"
    path.write_bytes(b"\r\n\n".join(prompt.encode() for prompt in prompts))
    assert read_prompts(str(path)) == prompts
    path = tmp_path / "p.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_bytes(MARK + "\n".join(lines).encode())
    assert read_prompts(str(path)) == prompts


def test_prompts_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """UTF-8 whatever the locale says, and split like a file."""
    stream = io.TextIOWrapper(io.BytesIO("schön\u2028日本\nzwei".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_prompts("-") == ["schön\u2028日本", "zwei"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\ncaf\xe9\n")))
    with pytest.raises(UsageError, match=r"line 2 of - must be UTF-8 \(got b'\\xe9'\)"):
        read_prompts("-")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "bad \\udcb2"}', "prompt in line 1 .* must be text that UTF-8 can encode"),
        ('{"prompt": null}', r"line 1 .* a string \"prompt\" \(got None\); its keys are prompt"),
        ('{"text": "x"}', r"\(got None\); its keys are text"),
        ('["x"]', r"\(got \['x'\]\); it is not an object"),
        ("plain text", r"line 1 of .* must be a JSON object .*\(got 'plain text'\)"),
    ],
)
def test_bad_prompts(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=says):
        read_prompts(str(path))


def test_arguments_are_utf8_in_any_locale() -> None:
    """Python decodes arguments by the locale; bytes that it lacks become surrogates."""
    in_ascii = "schön 日本".encode().decode("ascii", "surrogateescape")
    assert argument_text("--prompt", in_ascii) == "schön 日本"
    assert argument_text("--prompt", "schön 日本") == "schön 日本"
    with pytest.raises(UsageError, match=r"--prompt must be UTF-8 text \(got b'caf\\xe9'\)"):
        argument_text("--prompt", "caf\udce9")
    with pytest.raises(UsageError, match=r"U\+D83D is half of a surrogate pair"):
        argument_text("--prompt", "\ud83d")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1e400}', "1e400 in it is not a finite number"),
        (b'{"a": NaN}', "NaN in it is not a JSON value"),
        (b"[-Infinity]", "-Infinity in it is not a JSON value"),
        (b"9" * 301, "an integer of more than 300 digits"),
        (b'["\\"", ' + b"9" * 5000 + b"]", "more than 300 digits"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"\\uD83d": 1}', r"U\+D83D in it is half of a surrogate pair"),
        (b'["a\\udc00"]', "U\\+DC00"),
        ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
        (b"\xff", "codec can't decode"),
        (b"{", "Expecting property name"),
    ],
)
def test_json_of_settings_is_strict(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        json_value(content)


def test_json_that_is_accepted() -> None:
    digits = "9" * 5000
    assert json_value(BOM + b'{"a": "\\ud83d\\ude00", "b": -1e-400}') == {
        "a": "\U0001f600",
        "b": 0.0,
    }
    assert json_value(f'["{digits}", "\\"{digits}", 1e30]') == [digits, f'"{digits}', 1e30]
    assert json_value("9" * 300) == 10**300 - 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a = 1e999", "1e999 in it is not a finite number"),
        ("a = inf", "inf in it is not a finite number"),
        ("a = [{b = -nan}]", "nan in it is not"),
        ("a = [{b = 9223372036854775808}]", "more than 64 bits"),
        ("a = " + "9" * 5000, "limit"),
        ("a = 0x" + "f" * 5000, "more than 64 bits"),
        ("a = " + "[" * 100_000, "nested too deep"),
        ("a = ", "Invalid value"),
    ],
)
def test_toml_of_settings_is_strict(content: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        toml_value(content)
    assert toml_value("a = [1, -9223372036854775808, 1e308]") == {"a": [1, -(2**63), 1e308]}


@pytest.mark.parametrize("flag", READERS)
def test_a_named_pipe_is_no_file(tmp_path: Path, flag: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is a named pipe, not a regular file"):
        READERS[flag][1](str(tmp_path / "pipe"))


def check_settings(found: Any) -> None:
    """`--config` reads infinity, for the error of the setting that has it."""
    if isinstance(found, RunConfig):
        validate(found)


@pytest.mark.parametrize("flag", ["--config", "--phases", "--mixture", "--ul2-mixture"])
def test_every_file_of_settings_is_read_so(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "file"
    for number, says in (("1e999", "not a finite number"), ("9" * 5000, "limit|300 digits")):
        if flag == "--config":
            path.write_text(f'{{"optimizer": {{"lr": {number}}}}}')
            says = "--lr must be .*got inf" if number == "1e999" else says
        else:
            path.write_text(f"a = {number}")
        with pytest.raises(UsageError, match=says):
            check_settings(READERS[flag][1](str(path)))


def test_integers_of_settings_have_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model": {"hidden_size": 9223372036854775808}}')
    with pytest.raises(UsageError, match="--hidden-size must be an integer of 64 bits"):
        validate(RunConfig.load(path))
    path.write_text('{"optimizer": {"lr": 1' + "0" * 299 + "}}")
    with pytest.raises(UsageError, match="--lr must be"):
        validate(RunConfig.load(path))
