"""The report as a file: complete, without addresses of others, and with every text escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from megatron_moe.analysis.report import _plain, _shown, as_script, row_of, write_report
from tests.analysis import synthetic
from tests.analysis.synthetic import HOSTILE, Dims

SMALL = Dims(layers=2, experts=4)
LABELS = ["run@1000", "run@8000"]


class Page(HTMLParser):
    """Elements, links and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] not in ("script", "style"):
            self.texts.append(data.strip())

    def links(self) -> list[str]:
        return [
            v or ""
            for tag, attrs in self.tags
            if tag == "a"
            for k, v in attrs.items()
            if k == "href"
        ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two checkpoints with two layers, one of its labels hostile."""
    out = tmp_path_factory.mktemp("report")
    analyses = synthetic.invented(SMALL)
    labels = [*LABELS, HOSTILE.replace("/", "")]
    results = synthetic.invented_results(analyses, labels)
    models = synthetic.invented_models(labels, SMALL)
    return write_report(out, models, synthetic.invented_sample(), results, analyses=analyses)


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text())


def test_every_analysis_is_a_section_in_the_contents(page: Page) -> None:
    links = page.links()
    for analysis in synthetic.invented(SMALL).values():
        assert f"#analysis-{analysis.key}" in links
        assert f"analysis-{analysis.key}" in page.ids
        for text in (analysis.title, analysis.question, analysis.definition):
            assert text in page.texts
    assert len(page.ids) == len(set(page.ids))


def test_links_within_the_report_lead_to_files_and_anchors(report: Path, page: Page) -> None:
    for link in page.links():
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif "figures/" in link:
            assert (report.parent / unquote(link)).is_file(), link
        else:
            assert re.fullmatch(r"[^:]+/[a-z]+/(shares\.csv|result\.json)", unquote(link)), link


def test_each_figure_has_its_files_and_data(report: Path) -> None:
    found = re.findall(r'<script type="application/json">(.*?)</script>', report.read_text(), re.S)
    figures = [json.loads(text) for text in found]
    assert len(figures) == 3 + 1 + 2 + 3 + 1 + 2
    for figure in figures:
        assert len(figure["panels"]) == len(figure["files"])
        for name in figure["files"]:
            for kind in ("png", "svg"):
                assert (report.parent / f"{unquote(name)}.{kind}").is_file()


def test_texts_of_others_are_no_elements(page: Page) -> None:
    assert not [attrs for tag, attrs in page.tags if tag == "img" and "onerror" in attrs]
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    executed = [attrs for attrs in scripts if "type" not in attrs]
    assert len(executed) == 2
    assert HOSTILE in page.texts


def test_the_page_loads_nothing(page: Page) -> None:
    for tag, attrs in page.tags:
        for name in ("src", "href", "action", "data", "poster"):
            assert "//" not in (attrs.get(name) or ""), (tag, attrs)
        if tag == "script":
            assert "src" not in attrs
        if tag == "link":
            assert attrs == {"rel": "icon", "href": "data:,"}


def test_json_cannot_end_its_script() -> None:
    text = as_script({"a": "</script><!--", "b": "&amp;", "c": "\u2028"})
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"a": "</script><!--", "b": "&amp;", "c": "\u2028"}


def test_numbers_are_shown_with_four_digits() -> None:
    assert _shown(0.0625) == "0.0625"
    assert _shown(3.21987) == "3.22"
    assert _shown(1234567) == "1,234,567"
    assert _shown(7.0) == "7"
    assert _shown(float("nan")) == _shown(None) == "\N{EN DASH}"
    assert _plain(31999) == "31999"


def test_figures_of_checkpoints_stand_in_one_row(report: Path) -> None:
    assert row_of("heat-run@1000", ["run@1000", "run@8000"]) == "heat-*"
    assert row_of("heat-run@10000", ["run@1000", "run@10000"]) == "heat-*"
    assert row_of("bars", ["run@1000"]) == "bars"
    text = report.read_text()
    assert text.count('data-row="similarity heat-*"') == 3
