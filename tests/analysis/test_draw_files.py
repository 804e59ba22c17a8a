"""Figures as files: one page or a file per panel, literal texts, and the same bytes each time."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from megatron_moe.analysis.draw_files import COLUMN, PAGE, write_figure
from megatron_moe.analysis.draw_web import web_figure
from megatron_moe.analysis.plot import MOST_MARKS, Axis, Bars, Figure, Lines, Scatter, Series
from megatron_moe.analysis.style import styles
from megatron_moe.errors import UsageError
from tests.analysis import synthetic
from tests.analysis.synthetic import HOSTILE, Dims

SMALL = Dims(layers=2, experts=4)
KINDS = {
    "heatmap": synthetic.heatmap(SMALL, "a"),
    "scatter": synthetic.scatter(SMALL),
    "pieces": synthetic.pieces(SMALL),
    "categories": synthetic.categories(SMALL),
    "bars": synthetic.bars(SMALL),
    "stacked": synthetic.stacked(SMALL),
    "lines": synthetic.lines(SMALL, ["a", "b"]),
    "many lines": synthetic.many_lines(SMALL),
    "radar": synthetic.radar(SMALL),
    "flow": synthetic.flow(SMALL),
}


def svg_texts(path: Path) -> list[str]:
    """The text elements of an SVG file; raises if it is no valid XML."""
    root = ElementTree.parse(path).getroot()
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_drawn_as_text_and_fits_a_page(kind: str, tmp_path: Path) -> None:
    figure = KINDS[kind]
    files = write_figure(figure, tmp_path, "plot")
    assert files == dict.fromkeys(figure.panels, "plot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "plot.svg"]
    with Image.open(tmp_path / "plot.png") as image:
        width, height = (pixels / 300 for pixels in image.size)
        colours = image.convert("RGB").getcolors(1 << 24)
    assert COLUMN - 0.01 <= width <= PAGE + 0.01
    assert height <= 9.01
    assert colours is not None
    assert len(colours) > 20
    texts = svg_texts(tmp_path / "plot.svg")
    for name in figure.panels if len(figure.panels) > 1 else ():
        assert name in texts


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_figure(synthetic.bars(SMALL), tmp_path / folder, "plot")
    for name in ("plot.svg", "plot.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"<dc:date>" not in (tmp_path / "a" / "plot.svg").read_bytes()


def test_only_what_changed_is_drawn_again(tmp_path: Path) -> None:
    write_figure(synthetic.bars(SMALL), tmp_path, "plot")
    svg, png = tmp_path / "plot.svg", tmp_path / "plot.png"
    png.write_bytes(b"kept")
    write_figure(synthetic.bars(SMALL), tmp_path, "plot")
    assert png.read_bytes() == b"kept"
    before = svg.read_bytes()
    write_figure(synthetic.bars(Dims(layers=2, experts=5)), tmp_path, "plot")
    assert png.read_bytes() != b"kept"
    assert svg.read_bytes() != before


def test_texts_are_literal(tmp_path: Path) -> None:
    write_figure(synthetic.pieces(SMALL), tmp_path, "plot")
    content = (tmp_path / "plot.svg").read_text()
    assert "<script" not in content
    texts = svg_texts(tmp_path / "plot.svg")
    assert "$x$" in texts
    assert "</script>" in texts
    assert HOSTILE not in texts  # too long, so its middle is left out
    assert any(text.startswith("<script>") and "…" in text for text in texts)


def test_controls_and_lone_surrogates_do_not_break_the_file(tmp_path: Path) -> None:
    panel = Bars(
        series=[Series(name="\x1b[0m\udce9", x=["\x00", "b"], y=[1, 2])], x=Axis(), y=Axis()
    )
    write_figure(Figure(key="k", title="t", panels={"all": panel}), tmp_path, "plot")
    assert "\\x00" in svg_texts(tmp_path / "plot.svg")


def test_a_line_is_where_its_values_are(tmp_path: Path) -> None:
    """The path of a line in the file, scaled back, gives its values."""
    x, y = np.array([0.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0])
    panel = Lines(series=[Series(name="a", x=x, y=y)], x=Axis(), y=Axis())
    write_figure(Figure(key="k", title="t", panels={"all": panel}), tmp_path, "plot")
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    paths = [
        each.get("d", "")
        for each in root.iter("{http://www.w3.org/2000/svg}path")
        if "stroke: #0072b2" in each.get("style", "")
    ]
    assert len(paths) == 1
    words = paths[0].replace("M", "").replace("L", "").split()
    found = np.array(words, float).reshape(-1, 2)
    assert len(found) == 4
    for column, values, sign in ((0, x, 1), (1, y, -1)):
        place = sign * found[:, column]
        scaled = (place - place.min()) / np.ptp(place)
        np.testing.assert_allclose(scaled, (values - values.min()) / np.ptp(values), atol=1e-4)


def test_more_panels_than_a_page_holds_become_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_moe.analysis.draw_files.MOST_PANELS", 2)
    files = write_figure(synthetic.scatter(Dims(layers=3, experts=4)), tmp_path, "plot")
    names = ["plot-layer-0", "plot-layer-1", "plot-layer-2"]
    assert list(files.values()) == names
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{n}.{k}" for n in names for k in ("png", "svg")
    }


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **others: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"matplotlib must be installed .*pip install"):
        write_figure(KINDS["flow"], tmp_path, "plot")


def test_layers_have_no_ticks_between_them_and_rows_share_a_title(tmp_path: Path) -> None:
    lines = Lines(
        series=[Series(name="a", x=[1, 3], y=[10, 20])],
        x=Axis(title="layer"),
        y=Axis(title="a title of the axis"),
    )
    panels = {f"panel {name}": lines for name in "abcde"}  # two rows
    write_figure(Figure(key="x", title="", panels=panels), tmp_path, "x")
    texts = svg_texts(tmp_path / "x.svg")
    assert texts.count("a title of the axis") == 1
    assert {"1", "2", "3"} <= set(texts) and "1.5" not in texts


def _lines(**changes: Any) -> Lines:
    given: dict[str, Any] = {"x": Axis(), "y": Axis()}
    return Lines(**given | changes)


def test_values_on_a_logarithmic_axis_are_named(tmp_path: Path) -> None:
    panel = _lines(series=[Series(name="a", x=[4, 16, 64], y=[1, 2, 3])], x=Axis(log=True))
    write_figure(Figure(key="x", title="", panels={"all": panel}), tmp_path, "x")
    texts = svg_texts(tmp_path / "x.svg")
    assert {"4", "16", "64"} <= set(texts) and not any("10" in text for text in texts)
    (drawn,) = web_figure(Figure(key="x", title="", panels={"all": panel}))["panels"]
    axis = drawn["layout"]["xaxis"]
    assert (axis["type"], axis["tickvals"], axis["ticktext"]) == (
        "log",
        [4, 16, 64],
        ["4", "16", "64"],
    )


def test_long_titles_of_axes_are_wrapped(tmp_path: Path) -> None:
    long = "a title of the y-axis that is longer than its panel is high"
    panel = _lines(
        series=[Series(name="a", x=[1, 2], y=[1, 2])],
        x=Axis(title="what the x-axis of one of three panels shows in words"),
        y=Axis(title=long),
    )
    write_figure(Figure(key="x", title="", panels=dict.fromkeys("abc", panel)), tmp_path, "x")
    texts = svg_texts(tmp_path / "x.svg")
    lines = [text for text in texts if text in long and len(text) > 8]
    assert " ".join(lines) == long and max(map(len, lines)) <= 24  # 1.5 inches
    assert "what the x-axis of one of" in texts  # two lines below each panel


def test_equal_values_have_an_axis_from_zero(tmp_path: Path) -> None:
    panel = _lines(series=[Series(name="a", x=[1, 2], y=[2, 2])])
    write_figure(Figure(key="x", title="", panels={"all": panel}), tmp_path, "x")
    texts = svg_texts(tmp_path / "x.svg")
    assert {"0.0", "2.0", "2.5"} <= set(texts)


def test_secondary_lines_of_one_colour_differ() -> None:
    series = [
        Series(name=f"{group}{kind}", x=[0], y=[0], group=group, dashed=kind != "observed")
        for group in "ab"
        for kind in ("observed", "chance", "fixed")
    ]
    found = styles(series)
    assert [dash for _, dash, _ in found] == ["solid", "dash", "dot"] * 2
    assert len(set(found)) == 6


@pytest.mark.parametrize(("points", "printed"), [(MOST_MARKS, True), (MOST_MARKS + 1, False)])
def test_marks_are_beside_points_unless_there_are_many(
    tmp_path: Path, points: int, printed: bool
) -> None:
    at, marks = np.arange(float(points)), [f"#{place}$" for place in range(points)]
    panel = Scatter(series=[Series(name="a", x=at, y=at, marks=marks)], x=Axis(), y=Axis())
    write_figure(Figure(key="k", title="t", panels={"a": panel}), tmp_path, "plot")
    assert (set(marks) <= set(svg_texts(tmp_path / "plot.svg"))) is printed
