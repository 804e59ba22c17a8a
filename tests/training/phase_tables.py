"""A file of phases for tests, and the schedule that it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.training.phases import RunSchedule, resolve_run_schedule
from tests.training.tiny import MODEL

TABLE = """
[[stage]]
name = "first"
until-iteration = 8
objective = "prefix-lm"

[[stage]]
name = "second"
until-iteration = 14
objective = "causal"
seq-length = 64
micro-batch-size = 1
global-batch-size = 4
lr = 2e-3
min-lr = 1e-3
lr-decay-style = "linear"
lr-warmup-iters = 2
hidden-dropout = 0.2

[[stage]]
name = "third"
objective = "prefix-lm"
seed = 5
global-batch-size = 12
"""
FIRST = ["--objective", "prefix-lm"]
_SECOND = (
    "--seq-length 64 --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --min-lr 1e-3 "
    "--lr-decay-style linear --lr-warmup-iters 2 --lr-warmup-init 0"
)
SECOND = _SECOND.split()
"""The first two phases as flags."""


def schedule_of(text: str, line: str, directory: Path, world_size: int = 1) -> RunSchedule:
    """The schedule of a file with the tiny model and the flags of ``line``, once validated."""
    path = directory / "phases.toml"
    path.write_text(text)
    argv = [*MODEL, "--data-path", "corpus", "--phases", str(path), *line.split()]
    config = parse_args(argv).config
    validate(config)
    return resolve_run_schedule(config, world_size)


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """The steps in a run's metrics file."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "grad_norm" in line]
