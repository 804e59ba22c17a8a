"""Held-out losses by domain: those of runs on one domain alone, in every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank, write_domains

# Weights stay as they are, so that every run evaluates the same model. Rows have few targets or
# many, so that a mean of means would show.
FLAGS = (
    "--lr 0 --lr-warmup-iters 0 --train-iters 2 --log-interval 2 --eval-interval 1 --eval-iters 3 "
    "--split 50,40,10 --eod-mask-loss --global-batch-size 4 --micro-batch-size 1"
)
LAYOUTS: dict[str, tuple[int, str]] = {
    "DP2": (2, ""),
    "TP2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "workers": (1, "--num-workers 2"),
}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_domains(tmp_path_factory.mktemp("domains"))


def evaluations(
    pool: Pool, tmp_path: Path, paths: list[str], flags: str = "", ranks: int = 1
) -> tuple[list[dict[str, Any]], str]:
    """The records of a run, and its log."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    argv = [*MODEL, *FLAGS.split(), "--metrics-file", str(metrics), *flags.split()]
    results = pool.run(pretrain_rank, ranks, argv=[*argv, "--data-path", *paths])
    assert [(code, error) for code, _, error in results] == [(0, "")] * ranks
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "evaluation" in line], results[0][1]


@pytest.fixture(scope="module")
def blended(
    pool: Pool, domains: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str, Path]:
    folder = tmp_path_factory.mktemp("blended")
    paths = ["0.3", domains["low"], "0.7", domains["high"]]
    flags = f"--domain-eval-iters 3 --tensorboard-dir {folder}/board"
    return *evaluations(pool, folder, paths, flags), folder


@pytest.mark.parametrize("name", ["low", "high"])
def test_a_domains_loss_is_that_of_a_run_on_it_alone(
    pool: Pool, domains: dict[str, str], blended: Any, name: str, tmp_path: Path
) -> None:
    records, log = evaluations(pool, tmp_path, [domains[name]])
    assert records == [], "its loss is that of the blend, and the file has nothing but steps"
    alone = re.findall(r" (\w+) at iteration (\d) \| lm loss (\S+) .* targets (\d+)$", log, re.M)
    parts = [(r["evaluation"], r["iteration"], r["domains"][name]) for r in blended[0]]
    assert [(w, i, f"{p['lm_loss']:.6E}", p["targets"]) for w, i, p in parts] == [
        (split, int(iteration), loss, int(targets)) for split, iteration, loss, targets in alone
    ]


def test_each_evaluation_is_of_the_same_samples(blended: Any) -> None:
    records = blended[0]
    assert [(r["iteration"], r["evaluation"]) for r in records] == [
        (1, "validation"), (2, "validation"), (2, "test"),
    ]  # fmt: skip
    assert {**records[0], "iteration": 2} == records[1]
    low, high = (records[0]["domains"][name] for name in ("low", "high"))
    assert low["targets"] < 0.9 * high["targets"]
    assert abs(low["lm_loss"] - high["lm_loss"]) > 1e-3
    assert records[1]["domains"] != records[2]["domains"]


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=pytest.mark.slow) if n == "workers" else n for n in LAYOUTS]
)
def test_layouts_agree(
    pool: Pool, domains: dict[str, str], blended: Any, layout: str, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    paths = ["0.3", domains["low"], "0.7", domains["high"]]
    found, _ = evaluations(pool, tmp_path, paths, f"--domain-eval-iters 3 {flags}", ranks)
    for one, other in zip(found, blended[0], strict=True):
        for name in ("low", "high"):
            mine, want = one["domains"][name], other["domains"][name]
            assert mine["targets"] == want["targets"]
            assert mine["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-5)
        assert one["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)


def test_log_and_tensorboard_say_the_same(blended: Any) -> None:
    records, log, folder = blended
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    for name in ("low", "high"):
        points = board.Scalars(f"validation/lm loss of {name}")
        assert [(p.step, p.value) for p in points] == [
            (r["iteration"], pytest.approx(r["domains"][name]["lm_loss"])) for r in records[:2]
        ]
        assert len(board.Scalars(f"test/lm loss of {name}")) == 1
    line = next(line for line in log.splitlines() if line.startswith(" validation at iteration 1"))
    found = re.fullmatch(r".* \| low (\S+) \| high (\S+)", line)
    assert found is not None
    assert float(found[1]) == pytest.approx(records[0]["domains"]["low"]["lm_loss"], rel=1e-6)
    assert re.search(r"high +70\.00% +\d.* \d", log)


def test_how_many_batches(pool: Pool, domains: dict[str, str], tmp_path: Path) -> None:
    """By default the domains take what the blend takes, together; or none."""
    paths = list(domains.values())
    for flags, batches in (("--eval-iters 4", 2), ("--domain-eval-iters 1", 1)):
        found, _ = evaluations(pool, tmp_path, paths, f"{flags} --no-eod-mask-loss")
        assert [found[0]["domains"][n]["targets"] for n in ("low", "high")] == [
            batches * 4 * 32
        ] * 2
    found, log = evaluations(pool, tmp_path, paths, "--domain-eval-iters 0")
    assert found == []
    assert " validation at iteration 2 | " in log
