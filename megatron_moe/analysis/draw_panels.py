"""One panel on the axes of Matplotlib; `draw_files.py` arranges panels on a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_moe.analysis.plot import (
    MOST_MARKS,
    Axis,
    Bars,
    Flow,
    Heatmap,
    Lines,
    Panel,
    Radar,
    Reference,
    Scatter,
    Series,
)
from megatron_moe.analysis.style import (
    DIVERGING,
    NEUTRAL,
    SEQUENTIAL,
    colour_range,
    known_levels,
    many_colours,
    marked_values,
    node_sizes,
    positions,
    printable,
    styles,
    whole_numbers,
)

_DASH = {"solid": "-", "dot": ":", "dashdot": "-.", "longdash": (0, (7, 3)), "dash": "--"}
_MARKER = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "cross": "P",
    "x": "X",
}
_LABEL = 44
"""Characters of a label; longer ones lose their middle."""


def label(text: object, limit: int = _LABEL) -> str:
    """A text as Matplotlib shows it literally: a dollar sign begins no formula."""
    return printable(text, limit).replace("$", r"\$")


def draw_panel(axes: Any, panel: Panel, *, alone: bool) -> Any:
    """Draw a panel.

    Args:
        axes: polar for a `Radar`, else Cartesian.
        panel: what to draw.
        alone: whether it has the page for itself, and room for more names.

    Returns:
        The image of a `Heatmap`, for a colour bar; `None` for others.
    """
    if isinstance(panel, Heatmap):
        return _heatmap(axes, panel, alone)
    if isinstance(panel, Radar):
        return _radar(axes, panel, alone)
    if isinstance(panel, Flow):
        return _flow(axes, panel)
    if isinstance(panel, Bars):
        _bars(axes, panel)
    else:
        _points(axes, panel)
    for place, each in enumerate(known_levels(panel.references)):
        _reference(axes, place, each)
    _set_level(axes, panel)
    _set_axis(axes, panel.x, "x")
    _set_axis(axes, panel.y, "y")
    ticks = marked_values(each.x for each in panel.series) if panel.x.log else None
    if ticks:
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axes.set_xticks([], minor=True)
    if isinstance(panel, Lines) and not panel.x.log and whole_numbers(panel.series):
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 1.5
    axes.grid(visible=True, axis="both" if isinstance(panel, Scatter) else "y")
    return None


def _set_level(axes: Any, panel: Lines | Bars | Scatter) -> None:
    """An axis from 0 on for values that are all equal, around which it would show noise."""
    parts = [[each.value for each in known_levels(panel.references)]]
    for each in panel.series:
        parts += [list(v) for v in (each.y, each.low, each.high) if v is not None]
    values = np.concatenate([np.asarray(part, float) for part in parts])
    found = np.unique(values[np.isfinite(values)])
    if not found.any():
        axes.set_ylim(0, 1)
    elif len(found) == 1:
        axes.set_ylim(*sorted((0.0, 1.25 * found[0])))


def _set_axis(axes: Any, axis: Axis, name: str) -> None:
    getattr(axes, f"set_{name}label")(label(axis.title, 60))
    if axis.log:
        getattr(axes, f"set_{name}scale")("log")
    if axis.range is not None:
        getattr(axes, f"set_{name}lim")(*axis.range)


def _reference(axes: Any, place: int, reference: Reference) -> None:
    dashes = ("--", ":", "-.", (0, (7, 3)))
    dash = dashes[place % len(dashes)]
    style = {"color": NEUTRAL, "linestyle": dash, "linewidth": 0.9, "zorder": 3}
    axes.axhline(reference.value, label=label(reference.label), **style)


def _places(axes: Any, series: Sequence[Series]) -> list[np.ndarray[Any, Any]]:
    """The x of each series as numbers; ticks name the categories where they are texts."""
    if not any(positions(each.x) for each in series):
        return [np.asarray(each.x, float) for each in series]
    names = list(dict.fromkeys(str(v) for each in series for v in each.x))
    place = {name: i for i, name in enumerate(names)}
    _ticks(axes.xaxis, names, 40)
    return [np.array([place[str(v)] for v in each.x], float) for each in series]


def _ticks(axis: Any, names: Sequence[str], most: int) -> None:
    """Names at 0, 1, ...: all of them, or each second, fifth, ... if there are many."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500, 1000, 10000)
    step = next((s for s in steps if len(names) <= s * most), len(names))
    axis.set_ticks(range(0, len(names), step), [label(name, 18) for name in names[::step]])
    if axis.axis_name == "x" and max((len(name) for name in names), default=0) * len(names) > 40:
        turn = 90 if len(names[::step]) > 8 else 30
        if any(len(name) > 3 for name in names):
            align = "center" if turn == 90 else "right"
            axis.set_tick_params(rotation=turn)
            for text in axis.get_ticklabels():
                text.set_horizontalalignment(align)


def _points(axes: Any, panel: Lines | Scatter) -> None:
    places = _places(axes, panel.series)
    for each, x, style in zip(panel.series, places, styles(panel.series), strict=True):
        colour, dash, marker = style
        y = np.asarray(each.y, float)
        kind: dict[str, Any] = {"color": colour, "marker": _MARKER[marker]}
        if isinstance(panel, Scatter):
            size = 3.2 if len(x) <= 300 else 1.6
            kind |= {"linestyle": "", "markersize": size, "alpha": 0.75, "markeredgewidth": 0}
        else:
            width = 0.9 if each.dashed else 1.2
            kind |= {"linestyle": _DASH[dash], "linewidth": width, "markersize": 3}
            if not ((panel.markers and not each.dashed) or len(x) < 2):
                kind["marker"] = ""
        axes.plot(x, y, label=label(each.name), **kind)
        if isinstance(panel, Scatter) and len(each.marks or ()) <= MOST_MARKS:
            for at_x, at_y, mark in zip(x, y, each.marks or (), strict=False):
                beside = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": "x-small"}
                axes.annotate(label(mark), (at_x, at_y), ha="center", va="bottom", **beside)
        if each.low is not None and each.high is not None:
            low, high = np.asarray(each.low, float), np.asarray(each.high, float)
            if isinstance(panel, Lines):
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.vlines(x, low, high, color=colour, alpha=0.4, linewidth=0.6)
    if isinstance(panel, Scatter) and panel.diagonal and places:
        ys = [np.asarray(each.y, float) for each in panel.series]
        every = np.concatenate([*places, *ys])
        ends = [np.nanmin(every), np.nanmax(every)]
        axes.plot(ends, ends, color=NEUTRAL, linestyle=":", linewidth=0.8, zorder=1)


def _bars(axes: Any, panel: Bars) -> None:
    places = _places(axes, panel.series)
    count = 1 if panel.stacked else max(1, len(panel.series))
    every = np.unique(np.concatenate(places)) if places else np.zeros(0)
    step = float(np.diff(every).min()) if every.size > 1 else 1.0
    width = 0.8 * step / count
    up: dict[float, float] = {}
    down: dict[float, float] = {}
    hatches = {"solid": "", "dash": "////", "dot": "...", "dashdot": "xx", "longdash": "--"}
    for number, (each, x, style) in enumerate(
        zip(panel.series, places, styles(panel.series), strict=True)
    ):
        colour, dash, _ = style
        y = np.nan_to_num(np.asarray(each.y, float))
        kind = {"color": colour, "hatch": hatches[dash], "label": label(each.name), "linewidth": 0}
        if panel.stacked:
            base = np.array(
                [(up if h >= 0 else down).get(p, 0.0) for p, h in zip(x, y, strict=True)]
            )
            for p, h in zip(x, y, strict=True):
                heap = up if h >= 0 else down
                heap[p] = heap.get(p, 0.0) + h
            axes.bar(x, y, width, bottom=base, **kind)
        else:
            x = x + (number - (count - 1) / 2) * width
            axes.bar(x, y, width, **kind)
        if each.low is not None and each.high is not None and not panel.stacked:
            ends = np.asarray(each.low, float), np.asarray(each.high, float)
            axes.vlines(x, *ends, color="#222222", linewidth=0.6)
    if every.size:
        axes.set_xlim(every[0] - 0.6 * step, every[-1] + 0.6 * step)
    if not any(positions(each.x) for each in panel.series) and 1 < every.size <= 64:
        whole = [f"{v:g}" for v in every]
        few = max(1, -(-len(whole) // 8))
        axes.set_xticks(every[::few], whole[::few])


def _heatmap(axes: Any, panel: Heatmap, alone: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    scale = SEQUENTIAL if panel.centre is None else DIVERGING
    values = np.ma.masked_invalid(np.asarray(panel.values, float))
    low, high = colour_range(panel) or (0.0, 1.0)
    square = len(panel.rows) == len(panel.columns)
    image = axes.imshow(
        values,
        cmap=LinearSegmentedColormap.from_list("scale", list(scale)),
        vmin=low,
        vmax=high,
        aspect="equal" if square else "auto",
        interpolation="nearest",
    )
    _ticks(axes.xaxis, panel.columns, 16 if alone and square else 9)
    _ticks(axes.yaxis, panel.rows, 48 if alone and not square else 16 if alone else 10)
    axes.set_xlabel(label(panel.x.title, 60))
    axes.set_ylabel(label(panel.y.title, 60))
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _radar(axes: Any, panel: Radar, alone: bool) -> None:
    angles = np.linspace(0, 2 * np.pi, len(panel.categories), endpoint=False)
    around = np.append(angles, angles[:1])
    for each, (colour, dash, _) in zip(panel.series, styles(panel.series), strict=True):
        y = np.asarray(each.y, float)
        kind = {"color": colour, "linestyle": _DASH[dash], "linewidth": 1.1}
        axes.plot(around, np.append(y, y[:1]), label=label(each.name), **kind)
    if panel.reference is not None:
        circle = np.linspace(0, 2 * np.pi, 181)
        kind = {"color": NEUTRAL, "linestyle": "--", "linewidth": 0.9}
        level = np.full(circle.shape, panel.reference.value)
        axes.plot(circle, level, label=label(panel.reference.label), **kind)
    step = max(1, -(-len(angles) // (32 if alone else 16)))
    axes.set_xticks(angles[::step], [label(name, 16) for name in panel.categories[::step]])
    axes.set_ylim(bottom=0)
    axes.set_yticks(_few_ticks(axes.get_ylim()[1]))
    axes.set_rlabel_position(90)
    axes.tick_params(axis="x", pad=-2)
    axes.tick_params(axis="y", labelsize=6, labelcolor="#444444")


def _few_ticks(top: float) -> list[float]:
    """Radii with a name; at the edge it would touch the title above the circle."""
    from matplotlib.ticker import MaxNLocator

    return [float(v) for v in MaxNLocator(4).tick_values(0, top) if 0 < v < 0.92 * top]


def _flow(axes: Any, panel: Flow) -> None:
    from matplotlib.patches import Rectangle

    sizes = node_sizes(panel)
    most = max((len(column) for column in sizes), default=1)
    space, width = 0.15 / max(1, most), 0.05
    tops = []
    for place, (column, names) in enumerate(zip(sizes, panel.columns, strict=True)):
        unit = (1 - space * (len(column) - 1)) / max(column.sum(), 1e-12)
        heights = column * unit
        top = np.cumsum(heights) - heights + space * np.arange(len(column))
        tops.append((top, unit))
        for y, height, name, colour in zip(
            top, heights, names, many_colours(len(names)), strict=True
        ):
            axes.add_patch(Rectangle((place, y), width, height, color=colour, linewidth=0))
            side = -0.02 if place == len(sizes) - 1 else width + 0.02
            if height > 0.008:
                align = "right" if side < 0 else "left"
                kind = {"ha": align, "va": "center", "fontsize": 5, "zorder": 4}
                axes.text(place + side, y + height / 2, label(name, 14), **kind)
        if place < len(panel.titles):
            kind = {"ha": "center", "va": "bottom", "fontsize": 7}
            axes.text(place + width / 2, -0.015, label(panel.titles[place]), **kind)
    for place, flow in enumerate(panel.flows):
        _ribbons(axes, place, width, np.asarray(flow, float), tops[place], tops[place + 1])
    axes.set_xlim(-0.05, len(sizes) - 1 + width + 0.05)
    axes.set_ylim(1.0, -0.05)
    axes.set_axis_off()


def _ribbons(axes: Any, place: int, width: float, flow: Any, left: Any, right: Any) -> None:
    """Bands from each node to those of the next column, each side stacked from its top."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (tops_a, unit_a), (tops_b, unit_b) = left, right
    used_a, used_b = tops_a.copy(), tops_b.copy()
    colours = many_colours(len(tops_a))
    x0, x1 = place + width, place + 1
    middle = (x0 + x1) / 2
    codes = [1, 4, 4, 4, 2, 4, 4, 4, 79]  # MOVETO, three CURVE4, LINETO, three CURVE4, CLOSEPOLY
    for i, j in zip(*np.nonzero(flow), strict=True):
        a, b = used_a[i], used_b[j]
        used_a[i] += flow[i, j] * unit_a
        used_b[j] += flow[i, j] * unit_b
        c, d = used_a[i], used_b[j]
        corners = [(x0, a), (middle, a), (middle, b), (x1, b), (x1, d)]
        corners += [(middle, d), (middle, c), (x0, c), (x0, a)]
        kind = {"facecolor": colours[i], "alpha": 0.35, "linewidth": 0}
        axes.add_patch(PathPatch(Path(corners, codes), **kind))
