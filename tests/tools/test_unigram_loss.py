"""The unigram baseline of a run in stages: that of the stage, had as a run of its own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.data.indexed.writer import IndexedWriter
from tools.unigram_loss import main

_SIZES = (
    "--preset openmoe-tiny --tokenizer-type NullTokenizer --vocab-size 50 --seq-length 16 "
    "--micro-batch-size 2 --global-batch-size 2 --split 80,20,0 --eval-iters 3 --num-workers 0"
)
SIZES = _SIZES.split()
TABLE = """
[[stage]]
name = "low"
until-iteration = 5
objective = "prefix-lm"
data-path = ["{low}"]

[[stage]]
name = "high"
eval-iters = 4
data-path = ["{high}"]
"""
CHAT = '\n[[stage]]\nname = "chat"\nobjective = "sft"\ndata-path = ["chat.jsonl"]\n'


def _write(prefix: Path, ids: range) -> str:
    draw = np.random.default_rng(ids.start)
    with IndexedWriter(str(prefix), 50) as writer:
        for _ in range(60):
            writer.add_document(np.sort(draw.integers(ids.start, ids.stop, 20)))
    return str(prefix)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stages")
    sources = {
        "low": _write(folder / "low", range(2, 12)),
        "high": _write(folder / "high", range(2, 49)),
    }
    text = TABLE.format(**sources)
    (folder / "stages.toml").write_text(text)
    (folder / "chat.toml").write_text(text.replace("eval", "until-iteration = 9\neval") + CHAT)
    return {**sources, "stages": f"{folder}/stages.toml", "chat": f"{folder}/chat.toml"}


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What the command prints, which is a line."""
    capsys.readouterr()
    assert main([*SIZES, *words]) == code
    printed = capsys.readouterr()
    line = printed.err if code else printed.out
    assert (printed.out + printed.err, line.count("\n")) == (line, 1)
    return line


@pytest.mark.parametrize(
    ("stage", "name", "alone"),
    [
        ([], "high", ["--eval-iters", "4", "--data-path", "high"]),
        (["--phase", "2"], "high", ["--eval-iters", "4", "--data-path", "high"]),
        (["--stage", "low"], "low", ["--objective", "prefix-lm", "--data-path", "low"]),
        (["--stage", "1"], "low", ["--objective", "prefix-lm", "--data-path", "low"]),
    ],
)
def test_a_phase_has_the_loss_of_a_run_of_its_own(stage, name, alone, table, capsys):
    flags = [table.get(word, word) for word in alone]
    expected = run(capsys, *flags, "--train-iters", "5")
    found = run(capsys, "--stages", table["stages"], "--train-iters", "20", *stage)
    assert found == expected.replace(" (", f" of phase {name} (")
    assert float(found.split()[3]) > (3 if name == "high" else 2)


def test_a_saved_configuration_contains_its_phases(table, capsys, tmp_path):
    flags = ["--stages", table["stages"], "--train-iters", "20"]
    expected = run(capsys, *flags)
    parse_args([*SIZES, *flags]).config.save(tmp_path / "config.json")
    capsys.readouterr()
    assert main(["--config", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--stages", "{stages}", "--stage", "3"],
            r"--phase must be one of low, high, or a number from 1 to 2 \(got '3'\)",
        ),
        (
            ["--stages", "{stages}", "--stage", "hi"],
            r"--phase must be one of low, high, or a number from 1 to 2 \(got 'hi'\)",
        ),
        (
            ["--data-path", "{low}", "--stage", "1"],
            r"--phase must be unset for a run without phases \(got '1'\)",
        ),
        (
            ["--stages", "{chat}"],
            r"phase 'chat' of {chat}: --objective must be an objective over indexed data"
            r".*\(got 'sft'\)",
        ),
        (
            ["--stages", "{low}.none"],
            r"--phases must be a readable TOML file \(got '{low}.none'\)",
        ),
    ],
)
def test_refused_in_one_line(words, expected, table, capsys):
    line = run(capsys, *(w.format(**table) for w in words), "--train-iters", "9", code=2)
    assert re.search(expected.format(**table), line)
