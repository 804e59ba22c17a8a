"""Predictions beside published runs: the table of `docs/scaling.md` is what the planner says."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import load_cluster
from megatron_moe.planning.describe import known_vocab_size
from megatron_moe.planning.layout_plan import evaluate
from megatron_moe.planning.published import RUNS, PublishedRun

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name.split(",")[0])
def test_the_page_has_the_prediction_and_its_error(run: PublishedRun) -> None:
    plan = run.planned()
    error = plan.mfu / run.mfu - 1
    row = f"| {run.name} | {run.gpus} | {plan.mfu:.1%} | {run.mfu:.1%} | {error:+.0%} |"
    assert row in PAGE.read_text(), row
    # Nothing is fitted to these runs.
    assert abs(error) < 0.3
    assert plan.peak_bytes < plan.cluster.usable_bytes


def _rounded(value: float) -> str:
    """Three digits: 2.63, 0.718, 0.242."""
    return f"{value:.3g}"


@pytest.mark.parametrize(
    ("gpus", "batch"), [(64, 1024), (256, 1024), (1024, 1024), (1024, 4096), (8192, 8192)]
)
def test_the_page_has_the_layouts_of_the_34b_model(gpus: int, batch: int) -> None:
    flags = (
        "--preset openmoe-34b-32e --bf16 --optimizer adam --lr 1e-4 --lr-warmup-init 0 "
        "--micro-batch-size 1 --expert-tensor-parallel-size 1 --expert-model-parallel-size 32 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    )
    config = parse_args([*flags.split(), "--global-batch-size", str(batch)]).config
    vocab, _ = known_vocab_size(config)
    layout = resolve_layout(config, gpus, vocab)
    plan = evaluate(config, layout, vocab, load_cluster("h100"))
    row = (
        f"| {gpus} | {batch} | EP32 DP{gpus} | {plan.peak_bytes / 1e9:.1f} |"
        f" {_rounded(plan.time.total)} | {_tokens(plan.tokens_per_second)} | {plan.mfu:.1%} |"
    )
    assert row in PAGE.read_text(), row


def _tokens(rate: float) -> str:
    return f"{rate / 1e3:.0f}K" if rate < 1e6 else f"{_rounded(rate / 1e6)}M"
