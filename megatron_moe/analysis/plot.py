"""Plots as values: what is shown, not how. Two modules draw them: `draw_files` and `draw_web`.

A `Figure` has one or several panels of one kind, e.g. one per layer, among which the reader of the
report chooses; in files they stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis.

    Args:
        title: what is shown, with its unit.
        log: logarithmic.
        range: ends; `None` fits the values.
    """

    title: str = ""
    log: bool = False
    range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A line at a constant value of the y-axis, e.g. the chance level."""

    value: float
    label: str


MOST_MARKS = 64
"""Points of a series that texts beside them leave readable."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one line or group.

    Args:
        name: in the legend.
        x: values or categories.
        y: values; NaN leaves a gap.
        low, high: ends of an interval around y.
        dashed: drawn as a secondary line.
        text: shown for each point when the reader points at it.
        marks: printed beside each point of a `Scatter`, short; not beside more than `MOST_MARKS`.
        group: series of one group have one colour, e.g. those of a checkpoint.
    """

    name: str
    x: Sequence[Any] | Array
    y: Sequence[float] | Array
    low: Sequence[float] | Array | None = None
    high: Sequence[float] | Array | None = None
    dashed: bool = False
    text: Sequence[str] | None = None
    marks: Sequence[str] | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines through points."""

    series: Sequence[Series]
    x: Axis
    y: Axis
    references: Sequence[Reference] = ()
    markers: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars at categories, side by side or on top of each other."""

    series: Sequence[Series]
    x: Axis
    y: Axis
    references: Sequence[Reference] = ()
    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Points."""

    series: Sequence[Series]
    x: Axis
    y: Axis
    references: Sequence[Reference] = ()
    diagonal: bool = False


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """A matrix as colours.

    Args:
        values: [rows, columns]; NaN is left blank.
        rows, columns: labels.
        x, y: titles of the axes.
        colour: title of the colour bar.
        range: values of the ends of the colour scale; `None` fits the values.
        centre: value in the middle of a diverging scale, e.g. the chance level; `None` for a
            sequential one.
        text: shown for each cell when the reader points at it, [rows][columns].
    """

    values: Array
    rows: Sequence[str]
    columns: Sequence[str]
    x: Axis
    y: Axis
    colour: str
    range: tuple[float, float] | None = None
    centre: float | None = None
    text: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Radar:
    """Closed lines around a circle of categories.

    Args:
        categories: names around the circle.
        series: y is the radius; x is ignored.
        reference: radius of a circle that is drawn as well.
        radius: title of the radius.
    """

    categories: Sequence[str]
    series: Sequence[Series]
    radius: str
    reference: Reference | None = None


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Flows between nodes of consecutive columns (a Sankey diagram).

    Args:
        columns: names of the nodes of each column.
        titles: title of each column.
        flows: for each pair of consecutive columns, a matrix [from, to].
    """

    columns: Sequence[Sequence[str]]
    titles: Sequence[str]
    flows: Sequence[Array]


Panel = Lines | Bars | Scatter | Heatmap | Radar | Flow


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot of a report.

    Args:
        key: file name without suffix, unique within its analysis.
        title: one line.
        panels: by their name in the selector; a single one needs no selector.
        selector: what the panels differ in, e.g. `layer`.
        caption: what to look at, one or two sentences.
    """

    key: str
    title: str
    panels: Mapping[str, Panel]
    selector: str = "layer"
    caption: str = ""
