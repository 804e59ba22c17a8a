"""Figures with some of the experts."""

from __future__ import annotations

import numpy as np

from megatron_moe.analysis.plot import Axis, Bars, Figure, Flow, Heatmap, Lines, Radar, Series
from megatron_moe.analysis.selection import with_experts

EXPERT, LAYER = Axis(title="expert"), Axis(title="layer")
NUMBERS = np.arange(16.0).reshape(4, 4)
NAMES = ["0", "1", "2", "3"]


def _only(panel: object) -> object:
    figure = Figure(key="a", title="", panels={"p": panel})  # type: ignore[dict-item]
    return with_experts(figure, {1, 3, 99}).panels["p"]


def test_bars_of_experts_with_their_intervals() -> None:
    series = Series(name="a", x=[0, 1, 2, 3], y=[5, 6, 7, 8], low=[4, 5, 6, 7], high=[6, 7, 8, 9])
    found = _only(Bars(series=[series], x=EXPERT, y=Axis()))
    assert isinstance(found, Bars)
    (one,) = found.series
    assert list(one.x) == [1, 3] and list(one.y) == [6, 8]
    assert np.asarray(one.low).tolist() == [5, 7] and np.asarray(one.high).tolist() == [7, 9]


def test_lines_over_layers_stay() -> None:
    lines = Lines(series=[Series(name="a", x=[0, 1, 2, 3], y=[5, 6, 7, 8])], x=LAYER, y=Axis())
    assert _only(lines) is lines


def test_rows_and_columns_of_a_heat_map_and_what_is_no_expert() -> None:
    rows = [*NAMES[:3], "shared"]
    text = [[f"{i}{j}" for j in range(4)] for i in range(4)]
    panel = Heatmap(
        values=NUMBERS, rows=rows, columns=NAMES, x=LAYER, y=EXPERT, colour="", text=text
    )
    found = _only(panel)
    assert isinstance(found, Heatmap)
    assert (found.rows, found.columns) == (["1", "shared"], NAMES)
    assert np.asarray(found.values).tolist() == NUMBERS[[1, 3]].tolist()
    assert found.text == [text[1], text[3]]


def test_a_radar_and_a_flow() -> None:
    radar = Radar(
        categories=["E0", "E1", "E2", "E3"],
        series=[Series(name="a", x=[], y=[1, 2, 3, 4])],
        radius="",
    )
    found = _only(radar)
    assert isinstance(found, Radar)
    assert found.categories == ["E1", "E3"] and list(found.series[0].y) == [2, 4]
    flow = _only(Flow(columns=[NAMES, NAMES], titles=["1", "2"], flows=[NUMBERS]))
    assert isinstance(flow, Flow)
    assert flow.columns == [["1", "3"], ["1", "3"]]
    assert flow.flows[0].tolist() == [[5, 7], [13, 15]]
