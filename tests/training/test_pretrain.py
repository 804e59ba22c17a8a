"""`pretrain_openmoe.py` as a user starts it: usage errors come early, from all ranks, once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tiny import MODEL, pretrain_rank

ROOT = Path(__file__).parents[2]

USAGE_ERRORS = {
    "heads": ("--tensor-model-parallel-size 2 --num-attention-heads 5", "--tensor-model-parallel"),
    "experts": ("--expert-model-parallel-size 2 --num-experts 5", "--expert-model-parallel-size"),
    "layers": (
        "--pipeline-model-parallel-size 2 --num-layers 3 --moe-layer-freq 2",
        "--pipeline-model-parallel-size",
    ),
    "world": ("--tensor-model-parallel-size 4", "2 ranks"),
    "batch": ("--global-batch-size 6", "--global-batch-size"),
    "layer pattern": ("--moe-layer-freq [0]*3", "--moe-layer-freq"),
    "missing tokenizer": (
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model /nowhere.model",
        "/nowhere.model",
    ),
    "tokenizer larger than the vocabulary": (
        "--tokenizer-type ByteTokenizer --vocab-size 100",
        "--vocab-size",
    ),
    "missing data": ("--data-path /nowhere", "/nowhere"),
    "ids beyond the vocabulary": ("--vocab-size 50", "--vocab-size"),
    "length": ("--train-samples 80", "--train-iters"),
    "learning rate": ("--min-lr 1", "--min-lr"),
    "overlap": ("--overlap-param-gather", "--use-distributed-optimizer"),
    "missing checkpoint": ("--load /nowhere", "/nowhere"),
    "unknown flag": ("--num-expert 4", "--num-experts"),
}


@pytest.mark.parametrize("name", list(USAGE_ERRORS))
def test_every_rank_raises_the_same_usage_error_before_training(name, pool, corpus):
    line, named = USAGE_ERRORS[name]
    argv = [*MODEL, "--train-iters", "10", "--data-path", corpus, "--split", "100", *line.split()]
    results = pool.run(pretrain_rank, 2, argv=argv)
    (code, out, error), other = results
    assert other == (code, out, error)
    assert (code, out) == (2, "")
    assert named in error
    assert " must be " in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["experts", "missing data"])
def test_torchrun_ends_with_the_error_printed_once_and_code_2_of_every_rank(name, corpus):
    line, named = USAGE_ERRORS[name]
    done = torchrun(2, [*MODEL, "--train-iters", "10", "--data-path", corpus, *line.split()])
    printed = [text for text in done.stderr.splitlines() if "pretrain_openmoe.py: error:" in text]
    assert len(printed) == 1
    assert named in printed[0]
    assert "iteration" not in done.stdout
    codes = re.findall(r"^ *exitcode *: (-?\d+)", done.stderr, re.MULTILINE)
    assert codes == ["2", "2"]


def test_torchrun_trains_on_two_ranks(corpus, tmp_path):
    argv = [*MODEL, "--train-iters", "6", "--data-path", corpus, "--split", "80,20,0"]
    argv += ["--expert-model-parallel-size", "2", "--num-workers", "2", "--eval-iters", "1"]
    done = torchrun(2, [*argv, "--save", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(" iteration ") for line in lines) == 2
    assert any(line.startswith(" validation loss: ") for line in lines)
    assert f" saved iteration 6 to {tmp_path / 'iter_0000006'}" in lines


def test_a_run_that_diverges_stops_with_code_1_and_keeps_its_records(pool, corpus, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    argv = [*MODEL, "--train-iters", "40", "--data-path", corpus, "--split", "100"]
    argv += ["--optimizer", "sgd", "--clip-grad", "0", "--lr", "1e30", "--lr-warmup-iters", "0"]
    argv += ["--metrics-file", str(metrics), "--log-interval", "100", "--save", str(tmp_path)]
    (code, out, _), (other, _, _) = pool.run(pretrain_rank, 2, argv=argv)
    assert (code, other) == (1, 1)
    last = out.splitlines()[-1]
    assert "gradient norm must be finite (got " in last
    steps = len(metrics.read_text().splitlines())
    assert f" at iteration {steps + 1});" in last
    assert 1 <= steps < 40
    assert list(tmp_path.glob("iter_*")) == []


def test_describe_needs_no_launcher(capsys):
    import pretrain_openmoe

    pretrain_openmoe.main(["--preset", "openmoe-8b-32e", "--describe", "json"])
    assert '"num_experts": 32' in capsys.readouterr().out


def test_describe_may_be_cut_short_by_its_reader():
    """As `| head -0` does: the reader is gone before anything is printed."""
    command = [sys.executable, str(ROOT / "pretrain_openmoe.py"), "--preset", "openmoe-tiny"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*command, "--describe"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def torchrun(ranks: int, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Start the program under the real launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(ranks), str(ROOT / "pretrain_openmoe.py"), *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
