"""Runs with document boundaries: from flags to losses, with pipeline stages that have no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

FLAGS = "--train-iters 3 --log-interval 1 --eval-iters 1 --split 80,20,0"
RESETS = "--reset-position-ids --reset-attention-mask"
LAYOUTS = {
    "PP4": (4, "--pipeline-model-parallel-size 4"),
    "TP2xPP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
    ),
}


def losses(
    pool: Pool, corpus: str, folder: Path, flags: str = "", ranks: int = 1
) -> tuple[list[float], str]:
    """Of each step; and the last line of the evaluation."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    argv = [*MODEL, *FLAGS.split(), *flags.split(), "--data-path", corpus]
    results = pool.run(pretrain_rank, ranks, argv=[*argv, "--metrics-file", str(metrics)])
    assert [(code, error) for code, _, error in results] == [(0, "")] * ranks
    steps = [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()]
    (valid,) = (line for line in results[0][1].splitlines() if " validation loss: " in line)
    return [*steps, float(valid.split()[2])], results[0][1]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of two to ten tokens, each with its end."""
    from megatron_moe.data.indexed.writer import IndexedWriter

    prefix = str(tmp_path_factory.mktemp("ended") / "x")
    with IndexedWriter(prefix, 100) as writer:
        for start in range(1000):
            writer.add_document([*((start + i) % 97 for i in range(1 + start % 9)), 99])
    return prefix


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pipeline_stage_has_the_document_boundaries(
    pool: Pool, ended: str, tmp_path: Path, layout: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    alone, _ = losses(pool, ended, tmp_path, RESETS)
    spread, _ = losses(pool, ended, tmp_path, f"{RESETS} {flags}", ranks)
    assert spread == pytest.approx(alone, rel=1e-5)
    without, _ = losses(pool, ended, tmp_path)
    assert abs(without[0] - alone[0]) > 1e-4 * alone[0]
