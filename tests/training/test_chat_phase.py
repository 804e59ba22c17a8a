"""Conversations in the warm-up phase of a run: what each phase trains on, and resuming in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.data.chat_mixture import place_of
from megatron_moe.data.composition import share_of
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.pipeline import build_data
from tests.data.objectives.test_sft import chat, write_lines
from tests.support.pool import Pool
from tests.training.phase_tables import schedule_of, steps_of
from tests.training.tiny import MODEL, pretrain_rank

TABLE = """
[[stage]]
name = "warm-up"
until-iteration = 6
objective = "prefix-lm"
sft-share = 0.25

[[stage]]
name = "pretraining"
until-iteration = 10
objective = "prefix-lm"
seed = 5
"""
BYTES = ["--tokenizer-type", "ByteTokenizer", "--vocab-size", "259"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("phases")
    with IndexedWriter(str(folder / "text"), 259) as writer:
        for i in range(200):
            writer.add_document([3 + (7 * i + j) % 250 for j in range(40 + i % 30)] + [1])
    talks = [chat(f"{i}?", "ab" * (i % 5 + 1)) for i in range(40)]
    return str(folder / "text"), write_lines(folder / "chat.jsonl", talks)


def _argv(files: tuple[str, str], table: Path) -> list[str]:
    own = ["--data-path", files[0], "--sft-data-path", files[1], "--split", "80,20,0"]
    return [*MODEL, *BYTES, "--seq-length", "64", *own, "--phases", str(table)]


def test_samples_of_each_phase_are_as_stated(files: tuple[str, str], tmp_path: Path) -> None:
    """A quarter of the rows of the first phase, none of the second."""
    line = " ".join(_argv(files, tmp_path / "phases.toml")[len(MODEL) :])
    schedule = schedule_of(TABLE, line, tmp_path)
    found = []
    for phase in schedule.phases:
        data = build_data(
            phase.config,
            dp_rank=0,
            dp_size=1,
            num_microbatches=4,
            consumed_train_samples=0,
            reads_data=True,
        )
        assert data.train is not None
        pads = [batch.padding_BS for batch in data.train]
        assert len(pads) == 4 * (phase.last_iteration - phase.first_iteration)
        found.append([p is not None and bool(row.any()) for p in pads for row in _rows(p)])
    warm = schedule.phases[0].config
    assert found[0] == [place_of(share_of(warm), row)[0] for row in range(48)]
    assert (sum(found[0]), sum(found[1])) == (12, 0)


def _rows(padding: Any) -> Sequence[Any]:
    return [False, False] if padding is None else list(padding)


def _train(pool: Pool, world: int, directory: Path, argv: list[str]) -> None:
    directory.mkdir(exist_ok=True)
    out = ["--save", str(directory), "--metrics-file", str(directory / "metrics.jsonl")]
    for code, _, error in pool.run(pretrain_rank, world, argv=[*argv, *out]):
        assert code == 0, error


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        pytest.param(
            2, ["--pipeline-model-parallel-size", "2", "--num-workers", "1"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_resumes_within_the_phase_bitwise(pool, files, tmp_path, world, layout):
    """At steps 4 and 8: within each of the phases."""
    table = tmp_path / "phases.toml"
    table.write_text(TABLE)
    argv = [*_argv(files, table), *layout]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(pool, world, whole, argv)
    for start in range(3):
        load = ["--load", str(parts)] if start else []
        _train(pool, world, parts, [*argv, *load, "--exit-interval", "4"])
    assert len(steps_of(whole)) == 10
    assert steps_of(parts) == steps_of(whole)
    weights = [
        {f.name: f.read_bytes() for f in sorted((d / "iter_0000010").glob("*.safetensors"))}
        for d in (whole, parts)
    ]
    assert weights[0] and weights[0] == weights[1]


def test_a_completed_phase_keeps_its_share(pool, files, tmp_path):
    table = tmp_path / "phases.toml"
    table.write_text(TABLE)
    argv = _argv(files, table)
    _train(pool, 1, tmp_path / "run", [*argv, "--exit-interval", "8"])
    table.write_text(TABLE.replace("0.25", "0.5"))
    found = pool.run(pretrain_rank, 1, argv=[*argv, "--load", str(tmp_path / "run")])
    code, _, error = found[0]
    assert code == 2
    assert "--sft-share must be 0.25, as recorded in the checkpoint (got 0.5)" in error
