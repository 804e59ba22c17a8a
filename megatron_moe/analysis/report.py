"""The report: one HTML file that needs no network, and the figures and tables that it links to.

Plotly, all data, styles and scripts are inside the file. Every text of a model or dataset is
escaped, and the page's security policy allows its own two scripts by their hashes and no requests,
so that a label or token piece can run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from megatron_moe import __version__
from megatron_moe.analysis.base import Analysis, all_analyses
from megatron_moe.analysis.draw_files import require_matplotlib, write_figure
from megatron_moe.analysis.draw_web import web_figure
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.paper import Drawn, Entry, Given, Missing, Paper
from megatron_moe.analysis.plot import Figure, Heatmap, Radar
from megatron_moe.analysis.result import RESULT, Result, Table, write_table
from megatron_moe.analysis.run import COMPARED, by_analysis
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.selection import with_experts
from megatron_moe.analysis.style import ON_DARK, file_names, printable
from megatron_moe.checkpoint.disk import replace_bytes
from megatron_moe.errors import UsageError

REPORT, FIGURES = "report.html", "figures"
TEMPLATES = Path(__file__).parent / "templates"
TOGETHER = "together"
"""Heading of what several checkpoints show together."""
SHOWN_ROWS = 25
"""Rows of a table in the page; its CSV file has all."""
_MISSING = "–"  # noqa: RUF001
Values = dict[str, Any]


def write_report(
    out: Path,
    models: Sequence[MoEModel],
    sample: Sample | None,
    results: Mapping[str, Mapping[str, Result]],
    *,
    compared: Mapping[str, Result] | None = None,
    paper: Paper | None = None,
    analyses: Mapping[str, Analysis] | None = None,
    experts: Collection[int] | None = None,
    title: str = "Mixture-of-experts report",
) -> Path:
    """Write `report.html` and `figures/<analysis>/<figure>.png` and `.svg`.

    Args:
        out: directory of the results, `<label>/<analysis>/` in it.
        models: the checkpoints.
        sample: the tokens; `None` if only weights were analysed.
        results: by label of the checkpoint, then by key of the analysis.
        compared: what several checkpoints show together, by key of the analysis.
        paper: whose figures are drawn as well.
        analyses: by key; `None` for those of this package.
        experts: that figures with an axis of experts show; `None` for all. A paper's show all.
        title: heading.

    Returns:
        The path of the report.

    Raises:
        UsageError: matplotlib, plotly or jinja2 is not installed.
    """
    require_matplotlib()
    jinja2, plotly = _page_libraries()
    known = all_analyses() if analyses is None else analyses
    found = {key: each for key, each in by_analysis(results).items() if key in known}
    groups: dict[str, list[Values]] = {}
    for key in (key for key in known if key in found):
        together = (compared or {}).get(key)
        section = _section(out, known[key], found[key], together, experts)
        groups.setdefault(known[key].group, []).append(section)
    if paper is not None:
        given = Given(models=models, sample=sample, results=found, analyses=known)
        groups[f"Figures of {paper.title}"] = [
            _paper_section(out, paper, entry, given) for entry in paper.entries
        ]
    script = (TEMPLATES / "report.js").read_text()
    script = script.replace("/*ON_DARK*/{}", json.dumps(ON_DARK))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        models=[_model(model) for model in models],
        domains=_domains(sample),
        groups=list(groups.items()),
        css=(TEMPLATES / "report.css").read_text(),
        plotly=plotly,
        script=script,
        script_hashes=" ".join(_hash(text) for text in (plotly, script)),
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_bytes(out / REPORT, page.encode("utf-8", "backslashreplace"))
    return out / REPORT


def _page_libraries() -> tuple[Any, str]:
    """jinja2, and the text of plotly.js."""
    fix = "pip install 'megatron-moe[analysis]'"
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        name = str(error.name).split(".")[0]
        raise UsageError(name, "not installed", "installed to write a report", fix) from None
    return jinja2, str(get_plotlyjs()).replace("\r\n", "\n").replace("</script", "<\\/script")


def _hash(script: str) -> str:
    """The name of a script in a content security policy."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def as_script(value: Any) -> str:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _model(model: MoEModel) -> Values:
    sizes = model.sizes
    shown = (
        f"{len(sizes.moe_layers)} of {sizes.num_layers}",
        f"{sizes.topk} of {sizes.num_experts}",
        *(f"{size:,}" for size in (sizes.hidden_size, sizes.expert_width, sizes.vocab_size)),
    )
    return {
        "label": printable(model.label),
        "family": printable(model.family),
        "step": _MISSING if model.step is None else f"{model.step:,}",
        "routing": printable(model.routing, 200),
        "sizes": shown,
    }


def _domains(sample: Sample | None) -> list[Values]:
    if sample is None or not sample.domains:
        return []
    length = sample.seq_length
    rows = {domain.name: len(domain.starts) for domain in sample.domains}
    return [
        {
            "name": printable(name),
            "tokens": f"{count * length:,}",
            "rows": f"{count:,}",
            "length": f"{length:,}",
        }
        for name, count in rows.items()
    ]


def _section(
    out: Path,
    analysis: Analysis,
    found: Mapping[str, Result],
    together: Result | None,
    experts: Collection[int] | None,
) -> Values:
    """What the template shows of one analysis."""
    labels = list(found)
    figures = list(analysis.figures(found))
    if experts is not None:
        figures = [with_experts(figure, experts) for figure in figures]
    places = {label: f"{label}/{analysis.key}" for label in labels}
    shown = dict(found)
    if together is not None:
        shown[TOGETHER] = together
        places[TOGETHER] = f"{COMPARED}/{analysis.key}"
    notes = [
        note if len(shown) == 1 else f"{printable(label)}: {note}"
        for label, result in shown.items()
        for note in result.notes
    ]
    return {
        "anchor": f"analysis-{analysis.key}",
        "title": analysis.title,
        "question": analysis.question,
        "definition": analysis.definition,
        "source": analysis.source,
        "reading": printable(analysis.reading(found), 4000),
        "differs": "",
        "figures": _figures(out, analysis.key, figures, labels),
        "labels": [printable(label) for label, result in shown.items() if result.numbers],
        "numbers": _numbers({k: result for k, result in shown.items() if result.numbers}),
        "notes": [printable(note, 2000) for note in notes],
        "tables": [
            _table(table, places[label], f" of {printable(label)}" if len(shown) > 1 else "")
            for label, result in shown.items()
            for table in result.tables
        ],
        "files": [
            (printable(label), quote(f"{place}/{RESULT}")) for label, place in places.items()
        ],
    }


def _paper_section(out: Path, paper: Paper, entry: Entry, given: Given) -> Values:
    """What the template shows of a figure or table of a paper."""
    try:
        drawn = entry.draw(given)
    except Missing as missing:
        drawn = Drawn(notes=[f"Not drawn: {missing}."])
    name = file_names([entry.number])[entry.number].lower()
    folder = f"{FIGURES}/{paper.key}"
    names = file_names(table.name for table in drawn.tables)
    tables = [replace(table, name=names[table.name]) for table in drawn.tables]
    for table in tables:
        (out / folder).mkdir(parents=True, exist_ok=True)
        write_table(out / folder / f"{table.name}.csv", table)
    return {
        "anchor": f"{paper.key}-{name}",
        "title": f"{entry.number}: {entry.title}",
        "question": "",
        "definition": f"Drawn from: {', '.join(entry.needs)}." if entry.needs else "",
        "source": f"{paper.source}, {entry.number[0].lower()}{entry.number[1:]}",
        "reading": entry.finding,
        "figures": _figures(out, paper.key, drawn.figures, given.labels),
        "labels": [],
        "numbers": [],
        "notes": [printable(note, 2000) for note in drawn.notes],
        "differs": entry.differs,
        "tables": [_table(table, folder, "") for table in tables],
        "files": [],
    }


def _figures(out: Path, key: str, figures: Sequence[Figure], labels: Sequence[str]) -> list[Values]:
    names = file_names(figure.key for figure in figures)
    rows = [row_of(figure.key, labels) for figure in figures]
    # Figures of a row follow each other.
    order = sorted(range(len(rows)), key=lambda i: rows.index(rows[i]))
    figures, rows = [figures[i] for i in order], [rows[i] for i in order]
    made: list[Values] = []
    for figure, row in zip(figures, rows, strict=True):
        files = write_figure(figure, out / FIGURES / key, names[figure.key])
        values = web_figure(figure)
        paths = [quote(f"{FIGURES}/{key}/{files[panel]}") for panel in figure.panels]
        beside = rows.count(row) > 1
        first = next(iter(figure.panels.values()))
        made.append(
            {
                "anchor": f"figure-{key}-{names[figure.key]}",
                "title": printable(figure.title, 200),
                "caption": printable(figure.caption, 1000),
                "selector": figure.selector,
                "panels": [panel["name"] for panel in values["panels"]],
                "height": max(panel["height"] for panel in values["panels"]),
                "files": paths,
                "row": f"{key} {row}" if beside else "",
                "wide": not beside and not _is_square(first),
                "first": beside and rows.index(row) == len(made),
                "data": as_script({**values, "files": paths}),
            }
        )
    return made


def row_of(key: str, labels: Sequence[str]) -> str:
    """The key of a figure without the label of its checkpoint, if it has one.

    Figures of one row stand side by side, and their selectors move together.
    """
    for label in sorted(labels, key=len, reverse=True):
        if label in key:
            return key.replace(label, "*", 1)
    return key


def _is_square(panel: Any) -> bool:
    if isinstance(panel, Heatmap):
        return len(panel.rows) == len(panel.columns)
    return isinstance(panel, Radar)


def _numbers(found: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for result in found.values() for name in result.numbers)
    return [
        (printable(name), [_shown(result.numbers.get(name)) for result in found.values()])
        for name in names
    ]


def _shown(value: Any) -> str:
    """A cell: whole numbers in full, others with four significant digits."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return _MISSING
    if isinstance(value, bool | str):
        return printable(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not np.isfinite(value):
        return _MISSING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def _table(table: Table, folder: str, of: str) -> Values:
    rows = table.rows
    return {
        "title": printable(table.name) + of,
        "about": table.about,
        "count": len(rows),
        "columns": list(table.columns),
        "rows": [[_plain(cell) for cell in row] for row in rows[:SHOWN_ROWS]],
        "file": quote(f"{folder}/{table.name}.csv"),
    }


def _plain(value: Any) -> str:
    """As `_shown`, without separators: ids and indices are no quantities."""
    return _shown(value).replace(",", "") if isinstance(value, int | np.integer) else _shown(value)
