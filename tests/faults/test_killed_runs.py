"""Whole runs in processes of their own, killed again and again, that lose and repeat nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.checkpoint import latest_step, verify
from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.tokenizer.build import build_tokenizer
from tests.training.tiny import MODEL

ROOT = Path(__file__).resolve().parents[2]
_UL2 = (
    "--objective ul2 --ul2-fill-rows --seq-length 128 "
    "--tokenizer-type ByteTokenizer --vocab-extra-ids 60 --vocab-size 384"
)
KILLS = (" iteration 4/", " iteration 7/", " saved iteration 9 ")
"""Lines of the log at which the first, second and third start are killed."""


def _corpus(prefix: Path) -> str:
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="ByteTokenizer"))
    with IndexedWriter(str(prefix), tokenizer.vocab_size) as writer:
        for number in range(300):
            ids = tokenizer.tokenize(f"document {number}: " + "some words " * (number % 9 + 1))
            writer.add_document([*ids, tokenizer.eod])
    return str(prefix)


def _start(corpus: str, directory: Path, *flags: str) -> subprocess.Popen[str]:
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "14", "--hidden-dropout", "0.1"]
    argv += ["--log-interval", "1", "--save-interval", "3", *_UL2.split()]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory)]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_openmoe.py"), *argv, *flags],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _kill_at(process: subprocess.Popen[str], mark: str) -> list[str]:
    """Kill a run when it logs a line; the lines until then."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(mark):
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -9, f"the run ended before it logged {mark!r}"
    return lines


def _end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--async-save"]], ids=["sync", "async"])
def test_a_run_killed_three_times_is_one_that_was_not(tmp_path, flags):
    """Every loss to the bit, so every sample and every draw of noise once; the same last state."""
    corpus = _corpus(tmp_path / "corpus")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _end(_start(corpus, whole, *flags))
    resume = ["--load", str(killed), "--allow-missing-load"]
    for mark in KILLS:
        _kill_at(_start(corpus, killed, *flags, *resume), mark)
    _end(_start(corpus, killed, *flags, *resume))
    steps = (killed / "metrics.jsonl").read_text()
    assert [json.loads(line)["iteration"] for line in steps.splitlines()] == list(range(1, 15))
    assert steps == (whole / "metrics.jsonl").read_text()
    verify(killed)
    name = "iter_0000014/rank-00000.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--async-save"], marks=pytest.mark.slow)], ids=["sync", "async"]
)
def test_a_run_killed_in_its_last_evaluation_has_its_last_step(tmp_path, flags):
    """`--save` alone saves once, at the end: before the evaluation, which may take long."""
    corpus, directory = _corpus(tmp_path / "corpus"), tmp_path / "run"
    argv = ["--train-iters", "4", "--save-interval", "99", "--eval-iters", "100"]
    run = _start(corpus, directory, *argv, "--split", "8,2,0", *flags)
    lines = _kill_at(run, " saved iteration 4 ")
    assert not any(line.startswith(" validation") for line in lines)
    verify(directory, 4)
    assert latest_step(directory) == 4
