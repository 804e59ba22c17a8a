"""The report in a browser: no errors, no requests, every plot drawn, selectors, both widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.analysis.report import write_report
from tests.analysis import synthetic
from tests.analysis.browser import Opened
from tests.analysis.synthetic import Dims

SIZES = Dims(layers=3, experts=8)
LABELS = ["run@1000", "run@8000"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all kinds of plots and hostile texts."""
    analyses = synthetic.invented(SIZES)
    results = synthetic.invented_results(analyses, LABELS)
    models = synthetic.invented_models(LABELS, SIZES)
    out = tmp_path_factory.mktemp("report")
    return write_report(out, models, synthetic.invented_sample(), results, analyses=analyses)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_plot_is_drawn_within_the_width(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, report, width, scheme)
    assert opened.page.locator(".canvas[data-drawn]").count() < 12  # those far below come later
    assert opened.draw_all() == 2 + 1 + 2 + 3 + 1 + 2
    opened.check()
    opened.page.close()


def test_selectors_buttons_and_keys_change_the_plot(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, 1280)
    figure = opened.figure("figure-domains-bars")
    canvas = figure.locator(".canvas")

    def heights() -> list[str]:
        return [bar.get_attribute("d") for bar in canvas.locator(".barlayer path").all()]

    seen = [heights()]
    assert figure.get_by_role("button", name="previous layer").is_disabled()
    figure.get_by_label("layer", exact=True).select_option("layer 2")
    figure.locator(".canvas[data-drawn='layer 2']").wait_for()
    seen.append(heights())
    assert figure.get_by_role("button", name="next layer").is_disabled()
    figure.get_by_role("button", name="previous layer").click()
    figure.locator(".canvas[data-drawn='layer 1']").wait_for()
    seen.append(heights())
    canvas.focus()
    opened.page.keyboard.press("ArrowLeft")
    figure.locator(".canvas[data-drawn='layer 0']").wait_for()
    assert heights() == seen[0]
    assert len({tuple(each) for each in seen}) == 3
    opened.page.close()


def test_selectors_of_checkpoints_side_by_side_move_together(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, 1280)
    first, second = (opened.figure(f"figure-similarity-heat-{label}") for label in LABELS)
    boxes = [each.bounding_box() for each in (first, second)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    first.get_by_role("button", name="next layer").click()
    second.locator(".canvas[data-drawn='layer 1']").wait_for()
    assert second.locator("select").input_value() == "layer 1"
    opened.page.get_by_label("Move all selectors together").check()
    first.get_by_role("button", name="next layer").click()
    radar = opened.figure("figure-domains-radar")
    assert radar.locator(".canvas").get_attribute("data-drawn") == "layer 2"
    opened.page.close()


def test_contents_collapse_on_a_narrow_page(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, 400)
    link = opened.page.get_by_role("link", name="Router saturation")
    assert not link.is_visible()
    opened.page.locator("nav summary").click()
    link.click()
    assert not link.is_visible()
    opened.page.wait_for_timeout(50)
    heading = opened.page.locator("#analysis-saturation-title")
    heading.wait_for()
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    link.wait_for()
    opened.page.close()


def test_a_change_of_the_width_fits_the_plots(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, 1280)
    figure = opened.figure("figure-domains-bars")
    opened.page.set_viewport_size({"width": 400, "height": 900})
    figure.scroll_into_view_if_needed()
    opened.page.wait_for_timeout(500)
    box = figure.locator(".main-svg").first.bounding_box()
    assert box["width"] > 300
    assert box["x"] + box["width"] <= 400
    assert box["height"] > 300
    opened.page.set_viewport_size({"width": 1280, "height": 2000})
    opened.page.wait_for_timeout(500)
    box = figure.locator(".main-svg").first.bounding_box()
    assert box["width"] > 800
    assert box["height"] > 300
    opened.page.set_viewport_size({"width": 400, "height": 900})
    opened.page.wait_for_timeout(500)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
    opened.page.close()


def test_dark_and_printed_pages_have_readable_text(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, 1280, "dark")
    figure = opened.figure("figure-domains-bars")
    colour = "getComputedStyle(document.querySelector('.xtitle')).fill"

    def brightness() -> float:
        parts = opened.page.evaluate(colour).removeprefix("rgb(").rstrip(")").split(",")
        return sum(map(float, parts)) / 3

    assert figure.locator(".xtitle").count() == 1
    assert brightness() > 200
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.page.wait_for_timeout(300)
    assert brightness() < 50
    assert opened.page.locator(".canvas[data-drawn]").count() == 11
    opened.page.close()
