"""A run that resumes in other layouts takes the same samples and has the same losses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import MODEL, pretrain_rank

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
DIST = ["--use-distributed-optimizer"]
CHAINS: dict[str, list[tuple[int, list[str]]]] = {
    "DP 4, 2, 1": [(4, DIST), (2, DIST), (1, DIST)],
    "one, TP, PP": [(1, []), (2, TP2), (2, PP2)],
    "EP with and without the distributed optimizer, one": [(2, [*EP2, *DIST]), (2, EP2), (1, [])],
}
STEPS = 5
"""Steps of each start."""


def _run(pool: Any, world: int, corpus: str, directory: Path, flags: list[str]) -> None:
    # Capacity is by micro-batch, so all layouts have micro-batches of one size; no dropout.
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "15", "--micro-batch-size", "1"]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory)]
    for code, _, error in pool.run(pretrain_rank, world, argv=[*argv, *flags]):
        assert code == 0, error


def _steps(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pool, corpus, tmp_path_factory) -> list[dict[str, Any]]:
    """One process, without a stop."""
    directory = tmp_path_factory.mktemp("whole")
    _run(pool, 1, corpus, directory, [])
    return _steps(directory)


@pytest.mark.parametrize("name", CHAINS)
def test_samples_and_losses_do_not_depend_on_the_layouts(pool, corpus, tmp_path, whole, name):
    for number, (world, flags) in enumerate(CHAINS[name]):
        resumes = ["--load", str(tmp_path)] if number else []
        ends = ["--exit-interval", str(STEPS)]
        _run(pool, world, corpus, tmp_path, [*flags, *ends, *resumes])
    found = _steps(tmp_path)
    assert [step["iteration"] for step in found] == list(range(1, 16))
    for step, expected in zip(found, whole, strict=True):
        assert step["consumed_samples"] == expected["consumed_samples"]
        assert step["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)
    # Another order of the samples would show: losses of successive steps differ by far more.
    losses = [step["lm_loss"] for step in whole]
    apart = [abs(a - b) / a for a, b in pairwise(losses)]
    assert min(apart) > 1e-4
