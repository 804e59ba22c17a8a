"""A report in Debian's chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

BROWSER = Path(shutil.which("chromium") or "/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MARKS = ".trace, .heatmaplayer image, .scatterpolar path, .sankey-link, .barlayer path, .hm image"
"""What a plot with data has at least one of."""


class Opened:
    """A page, and what it reported and requested."""

    def __init__(self, browser: Any, report: Path, width: int, scheme: str = "light") -> None:
        self.report, self.width = report, width
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri(), timeout=120_000)

    def draw_all(self) -> int:
        """Scroll to each plot and wait for it; the number of plots."""
        canvases = self.page.locator("figure.plot .canvas")
        for place in range(canvases.count()):
            canvases.nth(place).scroll_into_view_if_needed()
            self.page.locator("figure.plot").nth(place).locator(".canvas[data-drawn]").wait_for()
        return int(canvases.count())

    def figure(self, identifier: str) -> Any:
        """The plot of that name, drawn."""
        found = self.page.locator(f"[id='{identifier}']")
        found.locator(".canvas").scroll_into_view_if_needed()
        found.locator(".canvas[data-drawn]").wait_for()
        return found

    def check(self) -> None:
        """Every plot has marks and lies within the page, which reported and requested nothing."""
        for figure in self.page.locator("figure.plot").all():
            name = figure.get_attribute("id")
            assert figure.locator(f"svg :is({MARKS})").count() > 0, name
            box = figure.locator(".main-svg").first.bounding_box()
            assert box["width"] > 300, name
            assert box["x"] + box["width"] <= self.width, name
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        assert self.page.evaluate("window.hacked === undefined")
        assert self.messages == []
        assert self.requests == [self.report.as_uri()]
