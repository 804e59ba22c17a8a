"""Figures as PNG and SVG files for a paper: as wide as a column or a page, with text as text.

The panels of a figure stand side by side with common axes and one legend; a figure with more panels
than a page holds becomes a file per panel. The same results give the same bytes; files that show
what is to be drawn already are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.analysis.draw_panels import draw_panel, label
from megatron_moe.analysis.draw_web import web_figure
from megatron_moe.analysis.plot import Bars, Figure, Flow, Heatmap, Lines, Panel, Radar, Scatter
from megatron_moe.analysis.style import file_names, with_common_ranges
from megatron_moe.checkpoint.disk import replace_bytes
from megatron_moe.errors import UsageError

COLUMN, PAGE, PAGE_HEIGHT = 3.25, 6.75, 9.0
"""Inches: width of a column and of the text of a page in two columns, and most height."""
DPI = 300
"""Of PNG files."""
CHARACTER = 0.062
"""Inches of a character of 8 points, about."""
MOST_PANELS = 24
"""Panels of a file."""
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "hatch.color": "white",
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    # Text as text, and the same identifiers each time.
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_moe",
}


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fix = "pip install 'megatron-moe[analysis]'"
        raise UsageError("matplotlib", "not installed", "installed to draw figures", fix) from None


def write_figure(figure: Figure, folder: Path, name: str) -> dict[str, str]:
    """Write a figure.

    Args:
        figure: what to draw.
        folder: of the files; it is made.
        name: of the files, without suffix.

    Returns:
        For each panel the name of its files, without suffix.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require_matplotlib()
    panels = with_common_ranges(figure.panels)
    folder.mkdir(parents=True, exist_ok=True)
    if len(panels) <= MOST_PANELS:
        _write(panels, folder / name)
        return dict.fromkeys(panels, name)
    names = file_names(f"{name}-{panel}" for panel in panels)
    made = {panel: names[f"{name}-{panel}"] for panel in panels}
    for panel, file in made.items():
        _write({panel: panels[panel]}, folder / file)
    return made


def _digest(panels: Mapping[str, Panel]) -> str:
    """Of what a file shows, and of what draws it."""
    digest = hashlib.sha256()
    for name in ("draw_files.py", "draw_panels.py", "style.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    figure = Figure(key="", title="", panels=panels)
    digest.update(json.dumps(web_figure(figure), sort_keys=True).encode())
    return f"data {digest.hexdigest()}"


def _is_drawn(path: Path, digest: str) -> bool:
    """Whether an earlier report has drawn the same."""
    svg, png = (path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png"))
    if not (svg.is_file() and png.is_file()):
        return False
    with svg.open("rb") as file:
        return digest.encode() in file.read(4096)


def _write(panels: Mapping[str, Panel], path: Path) -> None:
    digest = _digest(panels)
    if _is_drawn(path, digest):
        return
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with rc_context(_STYLE), warnings.catch_warnings():
        # A font lacks glyphs of some token pieces; SVG contains the text itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn = _arrange(panels)
        drawn.get_layout_engine().execute(drawn)
        drawn.set_layout_engine("none")  # once, not for each file
        # `savefig` would draw each file twice, to place again what has its place.
        content = io.BytesIO()
        FigureCanvasSVG(drawn).print_svg(content, metadata={"Date": None, "Description": digest})
        replace_bytes(path.with_name(f"{path.name}.svg"), content.getvalue())
        drawn.dpi = DPI
        content = io.BytesIO()
        FigureCanvasAgg(drawn).print_png(content, metadata={"Software": None})
        replace_bytes(path.with_name(f"{path.name}.png"), content.getvalue())


def _arrange(panels: Mapping[str, Panel]) -> Any:
    """A page with all panels, their names above them, and one legend or colour bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    kinds = list(panels.values())
    rows, columns, size = _grid(kinds)
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)
    page = Page(figsize=size, layout=engine)
    FigureCanvasAgg(page)
    images = []
    for place, (name, panel) in enumerate(panels.items()):
        polar = {"projection": "polar"} if isinstance(panel, Radar) else {}
        axes = page.add_subplot(rows, columns, place + 1, **polar)
        images.append((axes, draw_panel(axes, panel, alone=len(panels) == 1)))
        if len(panels) > 1:
            room = int(PAGE / columns / CHARACTER)
            axes.set_title(label(name, room), fontsize=7 if columns > 2 else 8)
            _keep_outer(axes, place, columns, len(panels))
    _common_title(page, kinds)
    _wrap_titles(page, size[0] / columns, (size[1] - _above(kinds)) / rows)
    if isinstance(kinds[0], Radar):
        page.supxlabel(f"radius: {label(kinds[0].radius, 60)}", fontsize=7)
    _legend(page, kinds)
    _colour_bars(page, images, kinds)
    return page


def _grid(panels: list[Panel]) -> tuple[int, int, tuple[float, float]]:
    """Rows, columns, and inches of the page."""
    count, first = len(panels), panels[0]
    above = _above(panels)
    if count == 1:
        width, height = _single(first)
        width = max(width, 0.75 * PAGE) if _beside(panels) else width
        return 1, 1, (width, min(PAGE_HEIGHT, height + above))
    columns = 1 if isinstance(first, Flow) else 2 if count in (2, 4) else 3 if count <= 9 else 4
    if isinstance(first, Bars) and _bars_of(first) > 48:
        columns = 2
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = 0.92 if isinstance(first, Heatmap) else 1.05 if isinstance(first, Radar) else 0.68
    if isinstance(first, Flow | Bars) and columns < 3:
        shape = 0.5
    height = rows * (PAGE / columns * shape + 0.1) + 0.3 + above
    return rows, columns, (PAGE, min(PAGE_HEIGHT, height))


def _single(panel: Panel) -> tuple[float, float]:
    if isinstance(panel, Flow):
        most = max((len(column) for column in panel.columns), default=1)
        return PAGE, min(PAGE_HEIGHT, max(3.0, 0.6 + 0.13 * most))
    if isinstance(panel, Radar):
        return COLUMN, COLUMN
    if isinstance(panel, Heatmap):
        rows, columns = len(panel.rows), len(panel.columns)
        if rows == columns:
            return COLUMN, 0.88 * COLUMN
        width = PAGE if columns > 40 else COLUMN
        return width, float(np.clip(0.9 + 0.14 * rows, 1.6, 7.0))
    wide = isinstance(panel, Bars) and _bars_of(panel) > 24
    names = [v for each in panel.series for v in each.x if isinstance(v, str)]
    longest = min(18, max(map(len, names), default=0))
    return (PAGE if wide else COLUMN), 2.3 + 0.06 * longest


def _beside(panels: list[Panel]) -> bool:
    """Whether the legend stands beside the panel: many entries above it would take its place."""
    return len(panels) == 1 and _legend_rows(panels) > 4


def _above(panels: list[Panel]) -> float:
    """Inches of the legend above the panels."""
    return 0.0 if _beside(panels) else 0.16 * _legend_rows(panels)


def _bars_of(panel: Bars) -> int:
    series = 1 if panel.stacked else len(panel.series)
    return series * max((len(each.x) for each in panel.series), default=0)


def _legend_entries(panels: list[Panel]) -> list[str]:
    names: list[str] = []
    for panel in panels:
        if isinstance(panel, Lines | Bars | Scatter):
            names += [label(e.name) for e in panel.series] + [
                label(r.label) for r in panel.references
            ]
        elif isinstance(panel, Radar):
            names += [label(each.name) for each in panel.series]
            names += [] if panel.reference is None else [label(panel.reference.label)]
    found = list(dict.fromkeys(names))
    return found if len(found) > 1 else []


def _legend_columns(panels: list[Panel]) -> int:
    entries = _legend_entries(panels)
    width = _single(panels[0])[0] if len(panels) == 1 else PAGE
    longest = max((len(entry) for entry in entries), default=1)
    return max(1, min(len(entries), int(width / (0.065 * longest + 0.5))))


def _legend_rows(panels: list[Panel]) -> int:
    return -(-len(_legend_entries(panels)) // _legend_columns(panels)) if panels else 0


def _legend(page: Any, panels: list[Panel]) -> None:
    """One legend above the panels, with each name once."""
    if not _legend_entries(panels):
        return
    found: dict[str, Any] = {}
    for axes in page.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    kind = {"loc": "outside upper center", "ncols": _legend_columns(panels)}
    if _beside(panels):
        kind = {"loc": "outside right upper", "ncols": 1}
    page.legend(found.values(), found.keys(), columnspacing=1.2, borderaxespad=0.2, **kind)


def _colour_bars(page: Any, images: list[tuple[Any, Any]], panels: list[Panel]) -> None:
    """One bar if all panels have one scale, else a bar at each."""
    drawn = [(axes, image) for axes, image in images if image is not None]
    if not drawn:
        return
    titles = [label(p.colour, 60) for p in panels if isinstance(p, Heatmap)]
    scales = {(image.norm.vmin, image.norm.vmax, image.cmap(0.5)) for _, image in drawn}
    if len(scales) == 1:
        every = [axes for axes, _ in drawn]
        share = {"fraction": 0.05, "aspect": 30, "shrink": 0.8 if len(every) == 1 else 0.5}
        bar = page.colorbar(drawn[0][1], ax=every, label=titles[0], **share)
        bar.outline.set_visible(False)
        return
    for (axes, image), title in zip(drawn, titles, strict=True):
        bar = page.colorbar(image, ax=axes, fraction=0.05, label=title)
        bar.outline.set_visible(False)


def _common_title(page: Any, panels: list[Panel]) -> None:
    """The title of the y-axis once for all rows of panels, where one row has no room for it."""
    titles = {axes.get_ylabel() for axes in page.axes} - {""}
    if len(panels) > 1 and len(titles) == 1 and page.axes[-1].get_gridspec().nrows > 1:
        for axes in page.axes:
            axes.set_ylabel("")
        page.supylabel(titles.pop(), fontsize=8)


def _wrap_titles(page: Any, width: float, height: float) -> None:
    """Titles of axes in lines that are no longer than a panel is wide or high.

    Args:
        page: with all panels.
        width: inches of a panel with its ticks and titles.
        height: the same.
    """
    for axes in page.axes:
        for axis, room in ((axes.xaxis, width - 0.45), (axes.yaxis, height - 0.45)):
            lines = textwrap.wrap(axis.get_label_text(), max(16, int(room / CHARACTER)))
            axis.set_label_text("\n".join(lines))


def _keep_outer(axes: Any, place: int, columns: int, count: int) -> None:
    """Titles of axes at the left and lower edges only."""
    if place % columns:
        axes.set_ylabel("")
    if place + columns < count:
        axes.set_xlabel("")
