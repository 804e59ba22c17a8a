"""The browser of the tests of reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.analysis.browser import BROWSER, FLAGS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A missing browser is an error and not a skipped test."""
    from playwright.sync_api import sync_playwright

    if not BROWSER.is_file():
        pytest.fail(f"{BROWSER} is missing: sudo apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=[*FLAGS])
        yield opened
        opened.close()
