"""Predictions beside published runs: the table of `docs/scaling.md` is what the planner says."""

from __future__ import annotations

from pathlib import Path

import pytest

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
