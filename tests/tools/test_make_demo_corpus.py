"""The demo corpus: what is taken, that it is the same each time, and that nothing leaks."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.support.usage_errors import usage_error
from tools import make_demo_corpus
from tools.make_demo_corpus import Document, choose, documents_of_library, library_files, main

MODULE = '''"""About the module, at some length."""

import os


class Thing:
    """A thing that is documented."""


def work(x):
    """Works.

    In two paragraphs.
    """
    text = """kept"""
    return x


def one_line(): "stays in the code"


async def other():
    # a comment
    "single quotes"
'''


def separated(source: str = MODULE) -> dict[str, str]:
    return {d.domain: d.text for d in make_demo_corpus.separate(source, "m.py")}


def test_docstrings_are_prose_and_not_code() -> None:
    parts = separated()
    assert parts["text"] == (
        "m.py\n\nAbout the module, at some length.\n\n"
        "Thing\n\nA thing that is documented.\n\n"
        "work\n\nWorks.\n\nIn two paragraphs.\n\n"
        "one_line\n\nstays in the code\n\n"
        "other\n\nsingle quotes\n"
    )
    assert parts["code"] == (
        "\nimport os\n\n\nclass Thing:\n    pass\n\n\ndef work(x):\n"
        '    text = """kept"""\n    return x\n\n\n'
        'def one_line(): "stays in the code"\n\n\n'
        "async def other():\n    # a comment\n    pass\n"
    )
    ast.parse(parts["code"])


def test_sources_that_do_not_parse_are_left_out() -> None:
    assert separated("def (:\n") == {}


def test_tests_and_packages_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "site-packages/c.py", "pkg/d.py", "pkg/tests/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    found = [p.relative_to(tmp_path).as_posix() for p in library_files(tmp_path)]
    assert found == ["a.py", "f.txt", "latin.py", "pkg/d.py"]
    assert {d.source for d in documents_of_library(tmp_path)} == {"a.py", "f.txt", "pkg/d.py"}


def test_choice() -> None:
    documents = [Document(chr(97 + i) * 300, "text", str(i)) for i in range(20)]
    documents += [Document("a" * 300, "text", "again"), Document("short", "text", "s")]
    chosen = choose(documents, 1.0)
    assert len({d.text for d in chosen}) == len(chosen) == 20
    assert choose(documents[::-1], 1.0) == chosen
    assert [d.source for d in chosen] != sorted(d.source for d in chosen)
    assert sum(len(d.text) for d in choose(documents, 0.001)) == 900


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_of_a_part_of_this_installation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = str(Path(sysconfig.get_path("stdlib")) / "email")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: part)
    for name in ("one", "two"):
        main(["--output-dir", str(tmp_path / name), "--megabytes", "0.2"])
    for domain in ("code", "text"):
        path = tmp_path / "one" / f"{domain}.jsonl"
        assert path.read_bytes() == (tmp_path / "two" / f"{domain}.jsonl").read_bytes()
        records = lines(path)
        assert {record["domain"] for record in records} == {domain}
        assert all(set(record) == {"text", "domain", "source"} for record in records)
        size = sum(len(record["text"].encode()) for record in records)
        assert 0.18e6 < size <= 0.2e6
    assert len(list((tmp_path / "one").iterdir())) == 2
    assert capsys.readouterr().out.count("documents") == 4


def test_no_docstring_of_the_library_is_in_its_code() -> None:
    """Over a real package: held-out prose was not seen as code."""
    root = Path(sysconfig.get_path("stdlib")) / "json"
    documents = list(documents_of_library(root))
    code = "".join(d.text for d in documents if d.domain == "code")
    prose = "".join(d.text for d in documents if d.domain == "text")
    assert "Deserialize ``fp``" in prose
    assert "Deserialize ``fp``" not in code
    assert "def load(" in code


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for words in (["--megabytes", "0"], []):
        usage_error(main, ["--output-dir", str(tmp_path / "file" / "x"), *words], capsys)
