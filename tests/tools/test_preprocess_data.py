"""The command line of preprocessing: Megatron-LM's flags, one line for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.corpus import engine_reads
from tools.preprocess_data import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab", "note": "c"}\n{"text": "", "note": "d"}\n')
    return path


def test_flags(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        f"--input {corpus} --output-prefix {tmp_path}/out --json-keys text note --append-eod "
        "--tokenizer-type ByteTokenizer --vocab-size 300 --workers 1 --log-interval 1".split()
    )
    assert engine_reads(tmp_path / "out_text_document") == [[100, 101, 1]]
    assert engine_reads(tmp_path / "out_note_document") == [[102, 1], [103, 1]]
    report = capsys.readouterr()
    assert report.out.startswith("2 documents in ")
    assert "out_text_document.bin and .idx" in report.out
    assert "2 documents" in report.err  # the progress line


def test_as_a_script_with_a_mistake(corpus: Path, tmp_path: Path) -> None:
    words = f"--input {corpus} --output-prefix {tmp_path}/out --tokenizer-type".split()
    script = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words]
    bad = subprocess.run([*script, "SentencePieceTokenizer"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == (
        "preprocess_data.py: error: --tokenizer-model is None, "
        "expected a SentencePiece model file\n"
    )
    good = subprocess.run([*script, "ByteTokenizer", "--workers", "2"], capture_output=True)
    assert good.returncode == 0
    assert engine_reads(tmp_path / "out_text_document") == [[100, 101]]


@pytest.mark.parametrize("flag", ["--workers", "--log-interval"])
def test_numbers_must_be_positive(
    corpus: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {corpus} --output-prefix out --tokenizer-type ByteTokenizer {flag} 0"
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert f"{flag} is 0, expected a positive number" in capsys.readouterr().err


def test_no_torch_is_imported() -> None:
    """Tokenizing starts at once, in every worker."""
    code = "import sys, tools.preprocess_data; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
