"""Plots of the report: valid for Plotly, with the values of the figure and literal texts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from megatron_moe.analysis.draw_web import web_figure
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
from megatron_moe.analysis.style import many_colours, scale_colour, styles
from tests.analysis.synthetic import HOSTILE
from tests.analysis.test_draw_files import KINDS


def drawn(panel: Panel) -> dict[str, Any]:
    figure = web_figure(Figure(key="k", title="t", panels={"all": panel}))
    first: dict[str, Any] = figure["panels"][0]
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_valid_for_plotly_and_json(kind: str) -> None:
    made = web_figure(KINDS[kind])
    json.dumps(made, allow_nan=False)
    assert [panel["name"] for panel in made["panels"]] == list(KINDS[kind].panels)
    for panel in made["panels"]:
        go.Figure(data=panel["data"], layout=panel["layout"])  # raises on an unknown property


def test_no_text_contains_a_tag() -> None:
    for figure in KINDS.values():
        texts = json.dumps(web_figure(figure)).replace("<br>", "").replace("<extra></extra>", "")
        assert "<" not in texts.replace("&lt;", "")
    trace = web_figure(KINDS["pieces"])["panels"][0]["data"][0]
    assert "&#36;x&#36;" in trace["y"]
    assert HOSTILE not in trace["y"]


def test_values_have_five_digits_and_gaps_are_null() -> None:
    values = np.array([[np.nan, 1 / 3], [2.0, np.inf]])
    panel = Heatmap(values=values, rows="ab", columns="cd", x=Axis(), y=Axis(), colour="")
    trace = drawn(panel)["data"][0]
    assert trace["z"] == [[None, 0.33333], [2.0, None]]
    assert (trace["zmin"], trace["zmax"]) == (1 / 3, 2.0)


def test_a_centre_is_in_the_middle_of_the_scale() -> None:
    values = np.array([[0.0, 0.25], [0.1, 0.9]])
    panel = Heatmap(
        values=values, rows="ab", columns="cd", x=Axis(), y=Axis(), colour="", centre=0.25
    )
    trace = drawn(panel)["data"][0]
    assert trace["zmax"] - 0.25 == pytest.approx(0.65)
    assert 0.25 - trace["zmin"] == pytest.approx(0.65)


def test_undefined_levels_are_left_out_and_numbers_of_any_type_are_json() -> None:
    two: Any = np.float32(2)
    levels = [Reference(value=float("nan"), label="undefined"), Reference(value=two, label="a")]
    lines = Lines(
        series=[Series(name="a", x=np.arange(3), y=np.arange(3, dtype=np.float32))],
        x=Axis(range=(two, two + two)),
        y=Axis(),
        references=levels,
    )
    nothing = Heatmap(
        values=np.full((2, 2), np.nan),
        rows="ab",
        columns="cd",
        x=Axis(),
        y=Axis(),
        colour="",
        range=(float("nan"), float("nan")),
    )
    undefined = Reference(value=float("nan"), label="undefined")
    circle = Radar(
        categories="abc",
        series=[Series(name="a", x=(), y=[1, 2, 3])],
        radius="r",
        reference=undefined,
    )
    for panel in (lines, nothing, circle):
        json.dumps(drawn(panel), allow_nan=False)
    assert [shape["name"] for shape in drawn(lines)["layout"]["shapes"]] == ["a"]
    assert len(drawn(circle)["data"]) == 1


def test_equal_categories_stay_apart() -> None:
    values = np.arange(4.0).reshape(2, 2)
    panel = Heatmap(values=values, rows=["a", "a"], columns="cd", x=Axis(), y=Axis(), colour="")
    assert drawn(panel)["data"][0]["y"] == ["a", "a\u200b"]


@pytest.mark.parametrize(
    ("points", "mode"), [(MOST_MARKS, "markers+text"), (MOST_MARKS + 1, "markers")]
)
def test_marks_are_beside_points_unless_there_are_many(points: int, mode: str) -> None:
    at, texts = np.arange(float(points)), [f"expert {place}" for place in range(points)]
    marks = [f"<{place}" for place in range(points)]
    series = Series(name="a", x=at, y=at, text=texts, marks=marks)
    trace = drawn(Scatter(series=[series], x=Axis(), y=Axis()))["data"][0]
    assert trace["mode"] == mode
    shown = ("text", "hovertext") if mode == "markers+text" else (None, "text")
    assert trace[shown[1]] == texts
    assert shown[0] is None or trace[shown[0]][1] == "&lt;1"


def test_panels_have_common_ranges_unless_given() -> None:
    def bars(height: float, axis: Axis) -> Bars:
        return Bars(series=[Series(name="a", x=[0, 1], y=[1.0, height])], x=Axis(), y=axis)

    figure = Figure(key="k", title="t", panels={"a": bars(2, Axis()), "b": bars(10, Axis())})
    ranges = [panel["layout"]["yaxis"]["range"] for panel in web_figure(figure)["panels"]]
    assert ranges == [[0, 10.5], [0, 10.5]]
    given = {"a": bars(2, Axis(range=(0, 3))), "b": bars(10, Axis())}
    panels = web_figure(Figure(key="k", title="t", panels=given))["panels"]
    assert panels[0]["layout"]["yaxis"]["range"] == [0, 3]
    assert "range" not in panels[1]["layout"]["yaxis"]


def test_flows_keep_their_totals_and_order() -> None:
    flow = np.array([[3.0, 0.0], [1.0, 4.0]])
    columns = [["a", "b"], ["a", "b"]]
    trace = drawn(Flow(columns=columns, titles=["x", "y"], flows=[flow]))["data"][0]
    link = trace["link"]
    found = list(zip(link["source"], link["target"], link["value"], strict=True))
    assert found == [(0, 2, 3.0), (1, 2, 1.0), (1, 3, 4.0)]
    y = trace["node"]["y"]
    assert y[0] < y[1]
    assert y[2] < y[3]


def test_series_of_a_group_share_a_colour_and_differ_in_dash() -> None:
    series = [
        Series(name=name, x=[], y=[], group=group, dashed=dashed)
        for name, group, dashed in (
            ("a", "g", False),
            ("b", "g", False),
            ("n", "g", True),
            ("c", "", False),
        )
    ]
    (one, two, null, other) = styles(series)
    assert one[0] == two[0] == null[0] != other[0]
    assert len({one[1], two[1], null[1]}) == 3


def test_scales_have_the_colours_of_their_sources() -> None:
    """That of Matplotlib at ten places, and close to it between them (of 255)."""
    from matplotlib import colormaps

    for count, most in ((10, 2), (37, 16)):
        for place in np.linspace(0, 1, count):
            wanted = [round(255 * v) for v in colormaps["viridis"](place)[:3]]
            colour = scale_colour(place)
            found = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert max(abs(a - b) for a, b in zip(wanted, found, strict=True)) <= most
    assert len(set(many_colours(32))) == 32
