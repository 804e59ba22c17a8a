"""Plots of the report: a figure as the data and layout of Plotly, ready for JSON.

Texts of others, such as labels and token pieces, are escaped: Plotly reads tags in any text.
Backgrounds, fonts and grids are the page's, see `templates/report.js`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_moe.analysis.plot import (
    MOST_MARKS,
    Axis,
    Bars,
    Figure,
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
    distinct,
    known_levels,
    many_colours,
    marked_values,
    node_sizes,
    positions,
    printable,
    styles,
    with_common_ranges,
)

Values = dict[str, Any]
HEIGHT = 360
"""Pixels of a plot without its legend."""
CATEGORY = 20
"""Characters of a category at an axis."""


def web_figure(figure: Figure) -> Values:
    """The panels of a figure.

    Returns:
        `selector`, and `panels`: a list of `name`, `data`, `layout`, `height` in pixels, and
        whether a heat map is `square`.
    """
    panels = with_common_ranges(figure.panels)
    drawn = [{"name": printable(name), **_panel(panel)} for name, panel in panels.items()]
    return {"selector": figure.selector, "panels": drawn}


def _panel(panel: Panel) -> Values:
    if isinstance(panel, Heatmap):
        return _heatmap(panel)
    if isinstance(panel, Radar):
        return _radar(panel)
    if isinstance(panel, Flow):
        return _flow(panel)
    data = _bars(panel) if isinstance(panel, Bars) else _points(panel)
    layout: Values = {
        "xaxis": _axis(panel.x, [each.x for each in panel.series]),
        "yaxis": _axis(panel.y, []),
        "shapes": [_reference(i, each) for i, each in enumerate(known_levels(panel.references))],
    }
    if _is_flat(panel):
        layout["yaxis"]["rangemode"] = "nonnegative"
    if isinstance(panel, Bars):
        layout["xaxis"]["showgrid"] = False
        layout |= {"barmode": "relative" if panel.stacked else "group", "bargap": 0.25}
    if isinstance(panel, Scatter) and panel.diagonal:
        layout["shapes"].append(_diagonal(panel))
    layout["showlegend"] = len(panel.series) > 1 or bool(layout["shapes"])
    return {"data": data, "layout": layout, "height": HEIGHT}


def _is_flat(panel: Lines | Bars | Scatter) -> bool:
    """Whether all values are 0, around which an axis would have negative values."""
    return not any(np.nan_to_num(np.asarray(each.y, float)).any() for each in panel.series)


def _label(text: object, limit: int = 80) -> str:
    """A text that Plotly shows literally: it reads tags, and formulas between dollar signs."""
    return html.escape(printable(text, limit), quote=False).replace("$", "&#36;")


def _categories(names: Sequence[object]) -> list[str]:
    return distinct([_label(name, CATEGORY) for name in names])


def _numbers(values: Any) -> list[Any]:
    """Numbers of five significant digits; what is not finite is null."""
    kept = np.asarray(values)
    if kept.dtype.kind in "OUS":
        return [_label(v, CATEGORY) for v in values]
    if kept.dtype.kind in "iub":
        return list(kept.tolist())
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in kept.tolist()]


def _axis(axis: Axis, columns: Sequence[Any]) -> Values:
    found: Values = {"title": {"text": _label(axis.title)}, "automargin": True}
    if axis.log:
        found["type"] = "log"
        if ticks := marked_values(columns):
            found |= {"tickvals": ticks, "ticktext": [f"{v:g}" for v in ticks]}
    elif any(positions(column) for column in columns):
        found["type"] = "category"
    elif columns and all(np.asarray(c).dtype.kind in "iu" and len(c) <= 12 for c in columns):
        ticks = sorted({int(v) for column in columns for v in column})
        if len(ticks) <= 12:
            found |= {"tickvals": ticks, "ticktext": [str(v) for v in ticks]}
    if axis.range is not None:
        low, high = map(float, axis.range)
        found["range"] = [float(np.log10(low)), float(np.log10(high))] if axis.log else [low, high]
    return found


def _reference(place: int, reference: Reference) -> Values:
    dashes = ("dash", "dot", "dashdot", "longdash")
    line = {"color": NEUTRAL, "width": 1.5, "dash": dashes[place % len(dashes)]}
    level = float(reference.value)
    ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
    return {
        "type": "line",
        **ends,
        "line": line,
        "name": _label(reference.label),
        "showlegend": True,
        "layer": "above",
    }


def _diagonal(panel: Scatter) -> Values:
    values = [np.asarray(part, float) for each in panel.series for part in (each.x, each.y)]
    every = np.concatenate(values) if values else np.zeros(1)
    ends = float(np.nanmin(every)), float(np.nanmax(every))
    places = {"x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1]}
    line = {"color": NEUTRAL, "width": 1, "dash": "dot"}
    return {"type": "line", **places, "line": line, "layer": "below", "name": "equal values"}


def _trace(series: Series, group: str) -> Values:
    found: Values = {
        "name": _label(series.name),
        "x": _numbers(series.x),
        "y": _numbers(series.y),
        "legendgroup": group,
        "hovertemplate": "%{x}: %{y:.4g}",
    }
    if series.text is not None:
        found["text"] = [_label(text) for text in series.text]
        found["textposition"] = "none"
        found["hovertemplate"] = "%{text}<br>%{x}: %{y:.4g}"
    return found


def _points(panel: Lines | Scatter) -> list[Values]:
    data: list[Values] = []
    for place, (each, style) in enumerate(zip(panel.series, styles(panel.series), strict=True)):
        colour, dash, marker = style
        trace = {"type": "scatter", **_trace(each, str(place))}
        trace.pop("textposition", None)
        if each.low is not None and each.high is not None and isinstance(panel, Lines):
            data += _band(each, colour, str(place))
        elif each.low is not None and each.high is not None:
            trace["error_y"] = _interval(each)
        if isinstance(panel, Scatter):
            size = 7 if len(each.x) <= 300 else 4
            trace["mode"] = "markers"
            trace["marker"] = {"color": colour, "symbol": marker, "size": size, "opacity": 0.75}
            if each.marks is not None and len(each.marks) <= MOST_MARKS:
                trace |= {"mode": "markers+text", "textposition": "top center"}
                trace["hovertext"], trace["text"] = trace.get("text"), list(map(_label, each.marks))
                trace["hovertemplate"] = "%{hovertext}<br>%{x}: %{y:.4g}"
        else:
            marked = (panel.markers and not each.dashed) or len(each.x) < 2
            trace["mode"] = "lines+markers" if marked else "lines"
            trace["line"] = {"color": colour, "dash": dash, "width": 1.5 if each.dashed else 2}
            trace["marker"] = {"color": colour, "symbol": marker, "size": 6}
        data.append(trace)
    return data


def _band(series: Series, colour: str, group: str) -> list[Values]:
    edge = {
        "type": "scatter",
        "mode": "lines",
        "line": {"color": colour, "width": 0},
        "x": _numbers(series.x),
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": group,
        "name": "interval",
    }
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.18)"}
    assert series.low is not None
    assert series.high is not None
    return [edge | {"y": _numbers(series.low)}, edge | {"y": _numbers(series.high)} | fill]


def _interval(series: Series) -> Values:
    y = np.asarray(series.y, float)
    return {
        "type": "data",
        "symmetric": False,
        "array": _numbers(np.asarray(series.high, float) - y),
        "arrayminus": _numbers(y - np.asarray(series.low, float)),
        "thickness": 1,
        "width": 2,
        "color": NEUTRAL,
    }


def _bars(panel: Bars) -> list[Values]:
    data: list[Values] = []
    for place, (each, style) in enumerate(zip(panel.series, styles(panel.series), strict=True)):
        colour, dash, _ = style
        trace = {"type": "bar", **_trace(each, str(place)), "marker": {"color": colour}}
        if dash != "solid":
            pattern = {"shape": {"dash": "/", "dot": ".", "dashdot": "x"}.get(dash, "-")}
            trace["marker"] |= {"pattern": {**pattern, "size": 5, "solidity": 0.4}}
        if each.low is not None and each.high is not None:
            trace["error_y"] = _interval(each)
        data.append(trace)
    return data


def _heatmap(panel: Heatmap) -> Values:
    scale = SEQUENTIAL if panel.centre is None else DIVERGING
    values = np.asarray(panel.values, float)
    low, high = colour_range(panel) or (0.0, 1.0)
    rows, columns = _categories(panel.rows), _categories(panel.columns)
    trace: Values = {
        "type": "heatmap",
        "z": [_numbers(row) for row in values],
        "x": columns,
        "y": rows,
        "zmin": low,
        "zmax": high,
        "colorscale": [[i / (len(scale) - 1), colour] for i, colour in enumerate(scale)],
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hoverongaps": False,
        "hovertemplate": "row %{y}, column %{x}: %{z:.4g}<extra></extra>",
    }
    if panel.text is not None:
        trace["text"] = [[_label(text) for text in row] for row in panel.text]
        trace["hovertemplate"] = "%{text}<br>%{z:.4g}<extra></extra>"
    x = {**_axis(panel.x, []), "type": "category", "showgrid": False}
    y = {**_axis(panel.y, []), "type": "category", "showgrid": False, "autorange": "reversed"}
    if len(rows) == len(columns):
        x |= {"constrain": "domain"}
        y |= {"constrain": "domain", "scaleanchor": "x"}
    square = len(rows) == len(columns)
    height = 460 if square else min(900, max(220, 130 + 16 * len(rows)))
    layout = {"xaxis": x, "yaxis": y, "annotations": [_scale_title(panel.colour)]}
    return {"data": [trace], "layout": layout, "height": height, "square": square}


def _scale_title(text: str) -> Values:
    """What colours mean, above the plot on the right."""
    place = {"x": 1, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "right"}
    shown = {"text": f"colour: {_label(text)}", "showarrow": False}
    return {**shown, **place, "yanchor": "bottom", "yshift": 6}


def _radar(panel: Radar) -> Values:
    categories = _categories(panel.categories)
    around = [*categories, *categories[:1]]
    data: list[Values] = []
    for each, (colour, dash, _) in zip(panel.series, styles(panel.series), strict=True):
        radius = _numbers(each.y)
        line = {"color": colour, "dash": dash, "width": 2}
        trace = {
            "type": "scatterpolar",
            "mode": "lines",
            "name": _label(each.name),
            "r": [*radius, *radius[:1]],
            "theta": around,
            "line": line,
            "hovertemplate": "%{theta}: %{r:.4g}",
        }
        data.append(trace)
    if panel.reference is not None and np.isfinite(panel.reference.value):
        circle = [float(panel.reference.value)] * len(around)
        line = {"color": NEUTRAL, "dash": "dash", "width": 1.5}
        extra = {"name": _label(panel.reference.label), "r": circle, "theta": around, "line": line}
        data.append({"type": "scatterpolar", "mode": "lines", "hoverinfo": "skip", **extra})
    layout = {
        "polar": {
            "radialaxis": {
                "angle": 90,
                "tickangle": 90,
                "rangemode": "tozero",
                "nticks": 5,
            },
            "angularaxis": {"type": "category", "direction": "counterclockwise"},
        },
        "annotations": [_corner(f"radius: {panel.radius}")],
        "showlegend": True,
    }
    return {"data": data, "layout": layout, "height": 460}


def _corner(text: str) -> Values:
    """A text below the plot."""
    place = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    return {"text": _label(text), **place, "yshift": -8, "showarrow": False}


def _flow(panel: Flow) -> Values:
    labels = [_label(name) for column in panel.columns for name in column]
    starts = np.cumsum([0, *(len(column) for column in panel.columns)])
    colours: list[str] = []
    for column in panel.columns:
        colours += many_colours(len(column))
    source: list[int] = []
    target: list[int] = []
    value: list[float] = []
    for place, flow in enumerate(panel.flows):
        rows, columns = np.nonzero(np.asarray(flow, float))
        source += (rows + starts[place]).tolist()
        target += (columns + starts[place + 1]).tolist()
        value += _numbers(np.asarray(flow, float)[rows, columns])
    links = {
        "source": source,
        "target": target,
        "value": value,
        "color": [_faint(colours[i]) for i in source],
        "hovertemplate": "%{source.label} → %{target.label}: %{value:.4g}<extra></extra>",
    }
    x, y = _node_places(panel)
    nodes = {
        "label": labels,
        "color": colours,
        "x": x,
        "y": y,
        "pad": 4,
        "thickness": 12,
        "line": {"width": 0},
        "hovertemplate": "%{label}: %{value:.4g}<extra></extra>",
    }
    titles = [_column_title(text, i, len(panel.titles)) for i, text in enumerate(panel.titles)]
    most = max((len(column) for column in panel.columns), default=1)
    trace = {"type": "sankey", "arrangement": "fixed", "node": nodes, "link": links}
    height = min(1100, max(HEIGHT, 80 + 18 * most))
    return {"data": [trace], "layout": {"annotations": titles}, "height": height}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"


def _column_title(text: str, place: int, count: int) -> Values:
    anchor = "left" if place == 0 else "right" if place == count - 1 else "center"
    return {
        "text": _label(text),
        "x": place / max(1, count - 1),
        "y": 1.0,
        "xref": "paper",
        "yref": "paper",
        "yshift": 16,
        "xanchor": anchor,
        "showarrow": False,
    }


def _node_places(panel: Flow) -> tuple[list[float], list[float]]:
    """Places of the nodes in (0, 1), in the order of their columns."""
    x: list[float] = []
    y: list[float] = []
    sizes = node_sizes(panel)
    most = max((len(column) for column in sizes), default=1)
    space = 0.15 / max(1, most)
    for place, column in enumerate(sizes):
        share = column / max(column.sum(), 1e-12) * (1 - space * (len(column) - 1))
        tops = np.cumsum(share) - share + space * np.arange(len(column))
        x += [min(0.999, max(0.001, place / max(1, len(sizes) - 1)))] * len(column)
        y += [float(f"{min(0.999, max(0.001, v)):.4f}") for v in tops + share / 2]
    return x, y
