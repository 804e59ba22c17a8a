"""The command line of preprocessing: Megatron-LM's flags, one line for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.data.indexed.manifest import read_manifest
from tests.data.corpus import read_with_megatron_core
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
    assert read_with_megatron_core(tmp_path / "out_text_document") == [[100, 101, 1]]
    assert read_with_megatron_core(tmp_path / "out_note_document") == [[102, 1], [103, 1]]
    report = capsys.readouterr()
    lines = report.out.splitlines()
    assert lines[0] == "word cache: off, ByteTokenizer has none"
    assert lines[1:3] == [
        "text: 2 documents, 3 tokens, 1.5000 tokens per byte",
        "note: 2 documents, 4 tokens, 2.0000 tokens per byte",
    ]
    assert lines[3].startswith("2 documents in ")
    assert "out_text_document.bin and .idx" in report.out
    assert "2 documents" in report.err  # the progress line


def test_as_a_script_with_a_mistake(corpus: Path, tmp_path: Path) -> None:
    words = f"--input {corpus} --output-prefix {tmp_path}/out --tokenizer-type".split()
    script = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words]
    bad = subprocess.run([*script, "SentencePieceTokenizer"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == (
        "preprocess_data.py: error: --tokenizer-model must be a SentencePiece model file "
        "(got None)\n"
    )
    good = subprocess.run([*script, "ByteTokenizer", "--workers", "2"], capture_output=True)
    assert good.returncode == 0
    assert read_with_megatron_core(tmp_path / "out_text_document") == [[100, 101]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--workers 0", "--workers must be >= 1 (got 0)"),
        ("--partitions 0", "--partitions must be >= 1 (got 0)"),
        ("--log-interval 0", "--log-interval must be >= 1 (got 0)"),
        ("--partition 1", "--partitions must be set with --partition (got None)"),
        (
            "--partitions 1 --partition 2",
            "--partition must be from 0 to 0 with --partitions 1 (got 2); a partition that is made "
            "again needs the --partitions of the first time",
        ),
        ("--json-keys text note text", "--json-keys must be distinct keys (got 'text note text')"),
    ],
)
def test_flags_that_cannot_be(
    corpus: Path, flags: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {corpus} --output-prefix out --tokenizer-type ByteTokenizer {flags}"
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_one_partition_alone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {corpus} --output-prefix {tmp_path}/out --tokenizer-type ByteTokenizer"
    words += " --domain books --vocab-extra-ids 300 --partitions 2 --partition"
    main([*words.split(), "0"])
    assert read_with_megatron_core(tmp_path / "out_part00000of00002_text_document") == [[100, 101]]
    assert len(list(tmp_path.glob("out*"))) == 3, "no other partition, and nothing merged"
    manifest = read_manifest(f"{tmp_path}/out_part00000of00002_text_document")
    assert manifest is not None
    assert (manifest.domain, manifest.vocab_size) == ("books", 559)
    capsys.readouterr()
    main([*words.split(), "0"])
    assert "partition 0 of 2: already finished, kept" in capsys.readouterr().out
    main([*words.split(), "1"])
    assert (tmp_path / "out_part00001of00002_text_document.idx").exists()


def test_partitions_of_another_cut(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {corpus} --output-prefix {tmp_path}/out --tokenizer-type ByteTokenizer"
    main([*words.split(), *["--partitions", "3", "--partition", "2"]])
    with pytest.raises(SystemExit):
        main([*words.split(), *["--partitions", "1", "--partition", "0"]])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--partitions must be 3, as the partitions that exist (got 1); " in line
    assert "out_part00002of00003_text_document.json" in line
    main([*words.split(), "--partitions", "1"])  # makes and merges its own
    assert (tmp_path / "out_text_document.idx").exists()


def test_no_torch_is_imported() -> None:
    """Tokenizing starts at once, in every worker."""
    heavy = "{'torch', 'megatron', 'pyarrow'}"
    code = f"import sys, tools.preprocess_data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
