"""A run whose layers have different numbers of experts: what watches its routing, and saves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.opening import open_model
from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import read_step
from tests.support.pool import Pool
from tests.training.phase_tables import steps_of
from tests.training.tiny import MODEL, pretrain_rank

FLAGS = ["--moe-layer-num-experts", "4", "8", "--num-experts", "8"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]


def _train(pool: Pool, world: int, corpus: str, folder: Path, flags: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    argv = [*MODEL, *FLAGS, "--data-path", corpus, "--split", "80,20,0", "--train-iters", "8"]
    argv += ["--metrics-file", str(folder / "metrics.jsonl"), "--save", str(folder), *flags]
    for code, _, error in pool.run(pretrain_rank, world, argv=argv):
        assert code == 0, error


def test_all_that_watches_routing_knows_each_layers_experts(
    pool: Pool, corpus: str, tmp_path: Path
) -> None:
    """Statistics, probes, traces and adaptive capacity, over two pipeline stages."""
    log, traces = tmp_path / "routing.jsonl", tmp_path / "traces"
    watched = ["--routing-log-file", str(log), "--routing-log-interval", "4"]
    watched += ["--routing-trace-dir", str(traces), "--routing-trace-steps", "2"]
    watched += ["--tensorboard-dir", str(tmp_path / "board"), "--eval-iters", "1"]
    watched += ["--moe-target-drop-rate", "0.2", "--moe-router-enable-expert-bias"]
    _train(pool, 2, corpus, tmp_path / "run", [*PP2, *watched])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (steps, *_), (probe, *_) = (
        [line for line in lines if key in line] for key in ("layers", "probe")
    )
    assert [len(layer["load"]) for layer in steps["layers"].values()] == [4, 8]
    # By chance, two experts of four and two of eight.
    assert probe["probe"]["chance"] == pytest.approx((2 / 4 + 2 / 8) / 2)
    trace, about = read_step(traces, 2)
    assert about.experts == 8
    chosen = [set(np.unique(trace.experts[trace.layer == layer])) for layer in (1, 3)]
    assert max(chosen[0]) < 4 <= max(chosen[1])
    with pytest.raises(UsageError, match="--moe-layer-num-experts must be unset in an analysed"):
        open_model(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), [("EP2", "PP2"), ("PP2", "1"), ("1", "EP2")])
def test_a_run_goes_on_in_another_layout(
    pool: Pool, corpus: str, tmp_path: Path, saved: str, loaded: str
) -> None:
    """With the losses of one process."""
    layouts = {"1": (1, []), "PP2": (2, PP2), "EP2": (2, EP2)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(pool, 1, corpus, whole, [])
    world, flags = layouts[saved]
    _train(pool, world, corpus, parts, [*flags, "--exit-interval", "4"])
    world, flags = layouts[loaded]
    _train(pool, world, corpus, parts, [*flags, "--load", str(parts)])
    expected = [step["lm_loss"] for step in steps_of(whole)]
    assert [step["lm_loss"] for step in steps_of(parts)] == pytest.approx(expected, rel=2e-4)
