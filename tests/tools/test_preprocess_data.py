"""The command line of preprocessing: Megatron-LM's flags, one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.manifest import read_manifest
from megatron_moe.data.preprocess import reading
from megatron_moe.data.preprocess.corpus import PreprocessOptions
from megatron_moe.data.preprocess.speed import measure_workers
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


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder as the hub has it, with a small `tokenizer.json`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    model = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "gpt2"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    vocabulary |= {"\u0120": 5, "\u0120a": 4}  # a space before a word, as byte-level pieces have it
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n\u0120 a\n", encoding="utf-8")
    return folder


PUBLIC = {
    "Megatron-LM 2025": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {model} --workers 2 --append-eod "
        "--json-keys text --partitions 2 --keep-sequential-samples --log-interval 100",
        "without effect: --keep-sequential-samples (the order of documents is always kept)",
    ),
    "Megatron-DeepSpeed": (
        "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {model} --dataset-impl=mmap "
        "--append-eod --workers 1 --pad-vocab-size-to 32128 --chunk-size 32",
        "--dataset-impl (mmap is the only format), --chunk-size (workers take batches of 512 KiB), "
        "--padded-vocab-size (padding of the vocabulary changes no id)",
    ),
    "Megatron-LM of 2020": (
        "--tokenizer-type GPT2BPETokenizer --vocab {model}/vocab.json --merge-file "
        "{model}/merges.txt --dataset-impl mmap --append-eod",
        "without effect: --dataset-impl (mmap is the only format)",
    ),
    "older": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {model} --append-eod "
        "--lang english --keep-newlines --trust-remote-code --make-vocab-size-divisible-by 128",
        "--keep-newlines (it belongs to --split-sentences), --lang (it belongs to",
    ),
}
"""Flags of public scripts, and what is said of those that have no effect."""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_command_lines(
    name: str, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, said = PUBLIC[name]
    (tmp_path / "c.jsonl").write_text('{"text": "ab a"}\n{"text": "b"}\n' * 3)
    words = f"--input {tmp_path}/c.jsonl --output-prefix {tmp_path}/out "
    main([*words.split(), *flags.format(model=gpt2).split()])
    a = 4 if "GPT2BPE" in flags else 1
    assert read_with_megatron_core(tmp_path / "out_text_document") == [[3, a, 0], [2, 0]] * 3
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert said in note


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--split-sentences", "--split-sentences must be absent (got 'given'); sentences serve"),
        ("--dataset-impl lazy", "--dataset-impl must be mmap (got 'lazy')"),
        ("--tokenizer-type Llama2Tokenizer", "without the BOS that Llama2Tokenizer puts before"),
        ("--tokenizer-type BertWordPieceCase", "BERT is not trained here"),
        ("--tokenizer-type Llama3Tokenizer", "reads the tokenizer.json of the same model"),
        ("--tokenizer-type Mine", "--tokenizer-type must be one of SentencePieceTokenizer, "),
        ("--workers-to-check 4 0", "--workers-to-check must be numbers that are each >= 1"),
        ("--max-documents 0", "--max-documents must be >= 1 (got 0)"),
        ("--inptu x --workers many", "flag must be one of preprocess_data.py's (got '--inptu')"),
        ("--workers many", "--workers must be an integer (got 'many')"),
        ("--output-prefix", "--output-prefix must be followed by one value (got None)"),
    ],
)
def test_other_flags_have_a_line_of_their_own(
    corpus: Path, flags: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {corpus} --output-prefix out --tokenizer-type ByteTokenizer {flags}"
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_speeds_are_measured_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH", 1000)
    (tmp_path / "c.jsonl").write_text('{"text": "some text"}\n' * 1000)
    words = f"--input {tmp_path}/c.jsonl --output-prefix {tmp_path}/out --tokenizer-type"
    words += " ByteTokenizer --find-optimal-num-workers --workers-to-check 1 2 1 --max-documents"
    main([*words.split(), "200"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "documents per second, fastest first:"
    rates = {int(line.split()[1]): float(line.split()[3]) for line in lines[1:3]}
    assert set(rates) == {1, 2}
    assert lines[3] == f"fastest: --workers {max(rates, key=lambda count: rates[count])}"
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_measurement_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 1000)
    line = '{"text": "some text"}\n'
    (tmp_path / "c.jsonl").write_text(line * 1000)
    options = PreprocessOptions(input=(f"{tmp_path}/c.jsonl",), output_prefix="out")
    (speed,) = measure_workers(options, DataConfig(tokenizer_type="ByteTokenizer"), [1], 200)
    in_batch = -(-1000 // len(line))
    # The first batch begins the clock; the last one is that in which the limit is reached.
    assert speed.documents == -(-200 // in_batch) * in_batch - in_batch
    (speed,) = measure_workers(options, DataConfig(tokenizer_type="ByteTokenizer"), [1], 10**6)
    assert speed.documents == 1000 - in_batch


def test_no_torch_is_imported() -> None:
    """Tokenizing starts at once, in every worker."""
    heavy = "{'torch', 'megatron', 'pyarrow'}"
    code = f"import sys, tools.preprocess_data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
