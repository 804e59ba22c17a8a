"""Runs are repeatable bit for bit, and a run that resumes equals one that never stopped.

Runs are compared by what they write: the hexadecimal floats of the metrics file, and every byte of
the tensors in the last checkpoint (weights, moments, and the random states of each rank).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_moe.config import MoEConfig, RunConfig
from megatron_moe.training.resume import _changes
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
# Two micro-batches a step: with four, hundreds of small exchanges, this takes twice as long.
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--global-batch-size", "4"]
LAYOUTS = {
    "one process": (1, ["--eval-iters", "1", "--eval-interval", "4"]),
    "EP2": (2, ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]),
    "DP2": (2, []),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "TP2": (2, TP2),
    "TP2, Adafactor": (
        2,
        [*TP2, "--optimizer", "adafactor", "--adafactor-min-dim", "20", "--bf16"],
    ),
    "TP2, Muon": (2, [*TP2, "--optimizer", "muon", "--bf16"]),
    "PP2, experts by layer": (
        2,
        [
            *("--pipeline-model-parallel-size", "2", "--num-experts", "8"),
            *("--moe-layer-num-experts", "4", "8", "--moe-router-enable-expert-bias"),
        ],
    ),
    "EP2xDP2, bf16, everything overlapped": (
        4,
        ["--expert-model-parallel-size", "2", "--bf16", *OVERLAPPED],
    ),
}


def _run(pool: Pool, world: int, corpus: str, directory: Path, flags: list[str]) -> list[str]:
    """Train up to step 20; returns the lines of rank 0's log."""
    argv = [*MODEL, *DROPOUT, "--data-path", corpus, "--split", "80,20,0", "--train-iters", "20"]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory), *flags]
    results = pool.run(pretrain_rank, world, argv=argv)
    for code, _, error in results:
        assert code == 0, error
    return results[0][1].splitlines()


def _steps(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _tensors(directory: Path) -> dict[str, bytes]:
    files = sorted((directory / "iter_0000020").glob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


SLOW = ("DP2", "TP2, Adafactor", "TP2, Muon", "PP2, experts by layer", "PP2", "EP2")
"""The others cover sharded state, tensor parallelism and overlap in each run of the tests."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_ten_steps_and_ten_more_are_twenty(name, pool, corpus, tmp_path):
    world, flags = LAYOUTS[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _run(pool, world, corpus, whole, flags)
    _run(pool, world, corpus, parts, [*flags, "--exit-interval", "10"])
    assert [step["iteration"] for step in _steps(parts)] == list(range(1, 11))
    _run(pool, world, corpus, parts, [*flags, "--load", str(parts)])
    steps = _steps(whole)
    assert [step["iteration"] for step in steps] == list(range(1, 21))
    assert len({step["lm_loss_hex"] for step in steps}) == 20
    assert _steps(parts) == steps
    tensors = _tensors(whole)
    assert len(tensors) == world
    assert _tensors(parts) == tensors


def test_twenty_steps_repeat(pool, corpus, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    _run(pool, 2, corpus, once, LAYOUTS["EP2"][1])
    _run(pool, 2, corpus, again, LAYOUTS["EP2"][1])
    assert _steps(again) == _steps(once)
    assert _tensors(again) == _tensors(once)


def test_an_evaluation_leaves_no_trace(pool, corpus, tmp_path):
    with_, without = tmp_path / "with", tmp_path / "without"
    _run(pool, 1, corpus, with_, ["--eval-iters", "2", "--eval-interval", "3"])
    _run(pool, 1, corpus, without, [])
    assert _steps(with_) == _steps(without)
    assert _tensors(with_) == _tensors(without)


def test_overlapping_communication_changes_nothing(pool, corpus, tmp_path):
    """Parameters that arrive during the next pass must be there for evaluations and saves too."""
    flags = ["--eval-iters", "1", "--eval-interval", "3", "--use-distributed-optimizer"]
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    lines = [
        _run(pool, 2, corpus, plain, flags),
        _run(pool, 2, corpus, overlapped, [*flags, *OVERLAPPED]),
    ]
    held_out = [[text for text in out if text.startswith(" validation")] for out in lines]
    assert len(held_out[0]) == 8
    assert held_out[0] == held_out[1]
    assert _steps(overlapped) == _steps(plain)
    assert _tensors(overlapped) == _tensors(plain)


def test_another_seed_is_another_run(pool, corpus, tmp_path):
    """What makes the comparisons above mean something."""
    one, other = tmp_path / "one", tmp_path / "other"
    _run(pool, 1, corpus, one, [])
    _run(pool, 1, corpus, other, ["--seed", "4321"])
    assert _steps(one) != _steps(other)
    assert _tensors(one) != _tensors(other)


def test_another_router_dispatcher_or_drop_policy_is_logged() -> None:
    """Files omit the first two at their defaults; the comparison has them nevertheless."""
    other = MoEConfig(
        moe_router_type="a", moe_token_dispatcher_type="b", moe_token_drop_policy="probs"
    )
    assert _changes(RunConfig(), RunConfig(moe=other)) == [
        "--moe-token-drop-policy was position, is probs",
        "--moe-router-type was linear, is a",
        "--moe-token-dispatcher-type was alltoall, is b",
    ]
