"""What drawn files and the report share: colours, common ranges of panels, names of files.

The colours of categories are those of Okabe and Ito (2008), which readers with any colour vision
tell apart, and three of Tol's "muted" scheme; the scales are viridis and ColorBrewer's RdBu.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_moe.analysis.plot import (
    Axis,
    Bars,
    Flow,
    Heatmap,
    Lines,
    Panel,
    Reference,
    Scatter,
    Series,
)
from megatron_moe.console import escape_controls

CATEGORICAL = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255"),
    *("#999933", "#332288", "#6b6b6b"),
)
"""Colours of categories, in order of use, on white."""
ON_DARK = {
    "#0072b2": "#4aa8e8",
    "#d55e00": "#f08a3c",
    "#009e73": "#2fc79b",
    "#882255": "#d66aa0",
    "#332288": "#9a8cf0",
    "#6b6b6b": "#a3a3a3",
}
"""What stands for some of them on a dark background."""
NEUTRAL = "#6b6b6b"
"""Reference lines and diagonals."""
SEQUENTIAL = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
"""viridis at ten equal steps, from low to high."""
DIVERGING = (
    *("#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7"),
    *("#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"),
)
"""RdBu, from below the centre (blue) to above it (red)."""
DASHES = ("solid", "dot", "dashdot", "longdash")
"""Of the lines that share a colour."""
MOST_TICKS = 8
"""Values that a logarithmic axis names one by one, at most."""
SECONDARY = ("dash", "dot", "dashdot", "longdash")
"""Of secondary lines, which are thinner and have no markers."""
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def scale_colour(place: float, scale: Sequence[str] = SEQUENTIAL) -> str:
    """Colour at ``place`` in [0, 1] of a scale, as `#rrggbb`."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in scale], float)
    at = np.linspace(0, 1, len(scale))
    red, green, blue = (round(np.interp(place, at, stops[:, i])) for i in range(3))
    return f"#{red:02x}{green:02x}{blue:02x}"


def many_colours(count: int) -> list[str]:
    """As many colours: of categories, or of an ordered scale where those do not suffice."""
    if count <= len(CATEGORICAL):
        return list(CATEGORICAL[:count])
    # The yellow end of the scale is hardly visible on white.
    return [scale_colour(0.9 * i / (count - 1)) for i in range(count)]


def styles(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    """Colour, dash and marker of each series.

    Series of one group share a colour and differ in dash and marker; so do its secondary series
    among themselves.
    """
    groups = list(dict.fromkeys(each.group or each.name for each in series))
    colours = dict(zip(groups, many_colours(len(groups)), strict=True))
    used: dict[tuple[str, bool], int] = {}
    found = []
    for each in series:
        group = each.group or each.name
        number = used.get((group, each.dashed), 0)
        used[group, each.dashed] = number + 1
        kinds = SECONDARY if each.dashed else DASHES
        dash = kinds[number % len(kinds)]
        # Many colours of a scale resemble their neighbours.
        turn = number if len(groups) <= len(CATEGORICAL) else groups.index(group)
        found.append((colours[group], dash, MARKERS[turn % len(MARKERS)]))
    return found


def with_common_ranges(panels: Mapping[str, Panel]) -> dict[str, Panel]:
    """The panels with equal ranges of values, where their author left them open.

    A reader who goes from layer to layer compares heights and colours.
    """
    kinds = {type(panel) for panel in panels.values()}
    if len(panels) < 2 or len(kinds) != 1:
        return dict(panels)
    values = list(panels.values())
    if isinstance(values[0], Heatmap):
        return dict(zip(panels, _common_colours(values), strict=True))
    if isinstance(values[0], Lines | Bars | Scatter):
        return dict(zip(panels, _common_heights(values), strict=True))
    return dict(panels)


def _common_colours(panels: Iterable[Any]) -> list[Heatmap]:
    found = list(panels)
    ranges = [colour_range(panel) for panel in found]
    known = [ends for ends in ranges if ends is not None]
    same = len({panel.centre for panel in found}) == 1
    if not known or not same or any(panel.range is not None for panel in found):
        return found
    common = min(low for low, _ in known), max(high for _, high in known)
    return [replace(panel, range=common) for panel in found]


def colour_range(panel: Heatmap) -> tuple[float, float] | None:
    """Ends of the colour scale; with a centre they are at equal distances from it.

    `None` if there is no finite value.
    """
    if panel.range is not None and np.isfinite(panel.range).all():
        return float(panel.range[0]), float(panel.range[1])
    values = np.asarray(panel.values, float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    if panel.centre is not None:
        reach = max(high - panel.centre, panel.centre - low) or 1.0
        return panel.centre - reach, panel.centre + reach
    return (low, high) if low < high else (low, low + 1.0)


def _common_heights(panels: Iterable[Any]) -> list[Lines | Bars | Scatter]:
    found: list[Lines | Bars | Scatter] = list(panels)
    if any(panel.y.range is not None or panel.y.log for panel in found):
        return found
    if any(isinstance(panel, Bars) and panel.stacked for panel in found):
        return found
    heights = np.concatenate([[0.0] if isinstance(p, Bars) else [] for p in found])
    parts = [np.asarray(heights, float), *(_heights(panel) for panel in found)]
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if not values.size or values.min() == values.max():
        return found
    low, high = float(values.min()), float(values.max())
    space = 0.05 * (high - low)
    bars = isinstance(found[0], Bars)
    ends = (
        low if bars and low == 0 else low - space,
        high if bars and high == 0 else high + space,
    )
    return [_with_y_range(panel, ends) for panel in found]


def _with_y_range(panel: Any, ends: tuple[float, float]) -> Any:
    axis: Axis = replace(panel.y, range=ends)
    return replace(panel, y=axis)


def _heights(panel: Lines | Bars | Scatter) -> np.ndarray[Any, np.dtype[np.float64]]:
    parts = [[reference.value for reference in known_levels(panel.references)]]
    for each in panel.series:
        parts += [list(v) for v in (each.y, each.low, each.high) if v is not None]
    return np.concatenate([np.asarray(part, float) for part in parts])


def known_levels(references: Sequence[Reference]) -> list[Reference]:
    """Without those of statistics that are undefined."""
    return [each for each in references if np.isfinite(each.value)]


def printable(text: object, limit: int = 80) -> str:
    """A text of others as a label: controls are escapes, and its middle may be left out."""
    shown = escape_controls(str(text)).encode("utf-8", "backslashreplace").decode()
    half = (limit - 1) // 2
    return shown if len(shown) <= limit else f"{shown[:half]}…{shown[-half:]}"


def distinct(labels: Sequence[str]) -> list[str]:
    """The labels, with spaces of no width after those that occur again.

    Axes merge equal categories.
    """
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label + "\u200b" * (seen[label] - 1))
    return found


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A name of a file, without suffix, for each distinct text; none differ in case alone."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        base = re.sub(r"[^A-Za-z0-9@._-]+", "-", name).strip("-.")[:80] or "figure"
        made, number = base, 1
        while made.lower() in taken:
            number += 1
            made = f"{base}-{number}"
        taken.add(made.lower())
        found[name] = made
    return found


def positions(values: Iterable[Any]) -> list[Any] | None:
    """The categories if an axis has texts; `None` if it has numbers."""
    kept = list(values)
    return [str(v) for v in kept] if any(isinstance(v, str) for v in kept) else None


def node_sizes(panel: Flow) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """What passes through each node, by column."""
    flows = [np.asarray(flow, float) for flow in panel.flows]
    first = [flows[0].sum(axis=1)] if flows else []
    middle = [np.maximum(a.sum(axis=0), b.sum(axis=1)) for a, b in pairwise(flows)]
    return first + middle + ([flows[-1].sum(axis=0)] if flows else [])


def marked_values(columns: Iterable[Any]) -> list[float] | None:
    """The x of series where they are few enough to be ticks of a logarithmic axis, else `None`."""
    values = sorted({float(v) for column in columns for v in column})
    return values if 0 < len(values) <= MOST_TICKS else None


def whole_numbers(series: Sequence[Series]) -> bool:
    """Whether all x are whole numbers, such as layers, so that ticks between them mean nothing."""
    values = [np.asarray(each.x) for each in series]
    return all(
        each.dtype.kind in "iu" or (each.dtype.kind == "f" and bool((each == each.round()).all()))
        for each in values
    )
