"""The Slurm array of preprocessing, run as Slurm runs it: tasks one by one, then the merge."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import sentencepiece

from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "preprocess_slurm.sbatch"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of text under a path with a space, and a model."""
    folder = tmp_path / "a corpus"
    folder.mkdir()
    words = [f"word{i} and {i * i}" for i in range(300)]
    for name in "ab":
        lines = (f'{{"text": "{word} {name}", "note": "{name}"}}\n' for word in words)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    with (folder / "t.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=model, vocab_size=60, minloglevel=2
        )
    return folder


def slurm(
    folder: Path, *words: str, task: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "2",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_CPUS_PER_TASK": "1",
        "PREFIX": f"{folder}/out",
    }
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(
        command, env=environment | more, capture_output=True, text=True, check=False
    )


def test_tasks_and_merge_equal_one_process(corpus: Path) -> None:
    link = corpus.parent / "corpus"  # globs are separated by spaces
    link.symlink_to(corpus)
    asked = {"INPUT": f"{link}/a.jsonl {link}/b*.jsonl", "KEYS": "text note"}
    asked |= {"TOKENIZER": f"{corpus}/t.model"}
    for task in (2, 0):
        assert slurm(corpus, "--domain", "d", task=task, **asked).returncode == 0
    early = slurm(corpus, "merge", **asked)
    assert early.returncode == 2
    assert "out_part00001of00003_text_document is missing" in early.stderr
    assert len(list(corpus.glob("out_part*.bin"))) == 4, "nothing is removed"
    assert slurm(corpus, "--domain", "d", task=1, **asked).returncode == 0
    merged = slurm(corpus, "merge", **asked)
    assert merged.returncode == 0, merged.stderr
    assert not list(corpus.glob("out_part*"))
    words = f"--json-keys text note --append-eod --domain d --input {asked['INPUT']}".split()
    model = ["--tokenizer-model", asked["TOKENIZER"]]
    model += ["--tokenizer-type", "SentencePieceTokenizer"]
    preprocess_data.main([*words, *model, "--output-prefix", f"{corpus}/one"])
    for name in ("text_document", "note_document"):
        for kind in ("bin", "idx", "json"):
            ours = (corpus / f"out_{name}.{kind}").read_bytes()
            assert ours == (corpus / f"one_{name}.{kind}").read_bytes()


def alone(task: int, **more: str) -> dict[str, str]:
    """What Slurm sets for one task that is submitted by itself."""
    bounds = {f"SLURM_ARRAY_TASK_{name}": str(task) for name in ("MIN", "MAX")}
    return {"SLURM_ARRAY_TASK_COUNT": "1", **bounds, **more}


def test_a_task_that_is_submitted_again(corpus: Path) -> None:
    """It belongs to the array of the first time, whose size Slurm no longer knows."""
    link = corpus.parent / "corpus"
    link.symlink_to(corpus)
    asked = {"INPUT": f"{link}/*.jsonl", "TOKENIZER": f"{corpus}/t.model"}
    assert slurm(corpus, task=1, **asked).returncode == 0
    done = slurm(corpus, task=2, **asked, **alone(2))
    assert done.returncode == 2
    assert done.stderr.startswith("the array must be 0-N without gaps (got 1 tasks from 2 to 2); ")
    assert "PARTITIONS" in done.stderr
    assert done.stderr.count("\n") == 1
    done = slurm(corpus, task=0, **asked, **alone(0))
    assert done.returncode == 2
    assert "--partitions must be 3, as the partitions that exist (got 1)" in done.stderr
    for task in (0, 2):
        assert slurm(corpus, task=task, **asked, **alone(task, PARTITIONS="3")).returncode == 0
    parts = {f"out_part{n:05d}of00003_text_document.json" for n in range(3)}
    assert {path.name for path in corpus.glob("out_part*.json")} == parts
    assert slurm(corpus, "merge").returncode == 0


def test_missing_settings_are_named(corpus: Path) -> None:
    done = slurm(corpus)
    assert done.returncode != 0
    assert "INPUT: files or globs of text" in done.stderr
    done = slurm(corpus, PREFIX="")
    assert "PREFIX: prefix of the output" in done.stderr


def test_the_array_starts_at_0() -> None:
    (line,) = [
        line for line in SCRIPT.read_text().splitlines() if "--array=" in line and "SB" in line
    ]
    assert line.startswith("#SBATCH --array=0-")
