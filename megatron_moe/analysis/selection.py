"""Figures with some of the experts (`--experts`): axes of experts show these alone.

Tables and arrays keep all experts; so do panels without an axis of experts, such as lines over
layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_moe.analysis.plot import Axis, Figure, Flow, Heatmap, Panel, Radar, Series

_NUMBER = re.compile(r"E?(\d+)$")


def with_experts(figure: Figure, experts: Collection[int]) -> Figure:
    """The figure with these experts.

    Args:
        figure: what all experts show.
        experts: ids; those that a panel does not have are ignored.
    """
    panels = {name: _panel(panel, experts) for name, panel in figure.panels.items()}
    return replace(figure, panels=panels)


def _panel(panel: Panel, experts: Collection[int]) -> Panel:
    if isinstance(panel, Heatmap):
        return _heatmap(panel, experts)
    if isinstance(panel, Radar):
        kept = _kept(panel.categories, experts)
        series = [replace(each, y=np.asarray(each.y)[kept]) for each in panel.series]
        return replace(panel, categories=[panel.categories[i] for i in kept], series=series)
    if isinstance(panel, Flow):
        kept_by = [_kept(names, experts) for names in panel.columns]
        columns = [
            [names[i] for i in kept] for names, kept in zip(panel.columns, kept_by, strict=True)
        ]
        flows = [
            np.asarray(flow)[np.ix_(kept_by[place], kept_by[place + 1])]
            for place, flow in enumerate(panel.flows)
        ]
        return replace(panel, columns=columns, flows=flows)
    if not _of_experts(panel.x):
        return panel
    return replace(panel, series=[_series(each, experts) for each in panel.series])


def _of_experts(axis: Axis) -> bool:
    return axis.title.split(",")[0] in ("expert", "experts")


def _kept(names: Sequence[Any], experts: Collection[int]) -> list[int]:
    """Places of the names to keep: of these experts, and of what is no expert, such as `shared`."""
    found = [_NUMBER.match(str(name)) for name in names]
    return [i for i, number in enumerate(found) if number is None or int(number[1]) in experts]


def _heatmap(panel: Heatmap, experts: Collection[int]) -> Heatmap:
    rows = _kept(panel.rows, experts) if _of_experts(panel.y) else range(len(panel.rows))
    columns = _kept(panel.columns, experts) if _of_experts(panel.x) else range(len(panel.columns))
    return replace(
        panel,
        values=np.asarray(panel.values)[np.ix_(list(rows), list(columns))],
        rows=[panel.rows[i] for i in rows],
        columns=[panel.columns[i] for i in columns],
        text=None if panel.text is None else [[panel.text[i][j] for j in columns] for i in rows],
    )


def _series(series: Series, experts: Collection[int]) -> Series:
    kept = _kept([int(x) if isinstance(x, float) else x for x in series.x], experts)

    def part(values: Any) -> Any:
        return None if values is None else np.asarray(values)[kept]

    text = None if series.text is None else [series.text[i] for i in kept]
    return replace(
        series,
        x=[series.x[i] for i in kept],
        y=part(series.y),
        low=part(series.low),
        high=part(series.high),
        text=text,
    )
