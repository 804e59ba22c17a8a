"""What `--describe` tells of a stage table, as text and as values for JSON. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe.data.composition import described_shares, share_lines
from megatron_moe.training.phases import Phase, RunSchedule, differences, named, phase_lines


def stage_section(schedule: RunSchedule) -> list[str]:
    """The table as it would be run: each stage, what it changes, and its training data."""
    lines, before = ["Stages"], None
    for stage, line in zip(schedule.phases, phase_lines(schedule), strict=True):
        lines.append(f"  {line}")
        if before is not None:
            lines += [f"    {line}" for line in differences(before.config, stage.config)]
        shares = _shares(stage)
        lines += [f"    {line}" for line in share_lines(shares)] if shares else []
        before = stage
    return lines


def stage_values(schedule: RunSchedule) -> list[dict[str, Any]]:
    """One object for each stage: its place in the run, settings, layout and training data."""
    return [_values(stage) for stage in schedule.phases]


def _values(stage: Phase) -> dict[str, Any]:
    return {
        "name": stage.name,
        "first_iteration": stage.first_iteration,
        "last_iteration": stage.last_iteration,
        "first_sample": stage.first_sample,
        "samples": stage.samples,
        "first_token": stage.first_token,
        "last_token": stage.last_token,
        "learning_rate_counts_from": stage.rate_origin,
        "config": stage.config.to_dict(),
        "layout": dataclasses.asdict(stage.layout),
        "training_data": [dataclasses.asdict(share) for share in _shares(stage)],
    }


def _shares(stage: Phase) -> Any:
    with named(stage.label):
        return described_shares(stage.config, stage.layout.global_batch_size)
