"""The rows of `docs/reliability.md` and the tests that each of them names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = "docs/reliability.md"
_TABLES = {"## Faults and their tests": "case", "## Features that protect a run": "feature"}
_TEST = re.compile(r"`(tests/[^`]+\.py(?:::\w+)?)`")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of one of the two tables."""

    name: str
    """`case 14`, `feature 6`."""
    tests: tuple[str, ...]
    """Node ids of the column `tests`."""
    planted: str
    """The column `planted fault`: faults in words, or why there is none."""


def rows(root: Path) -> dict[str, Row]:
    """The rows of both tables by name, in their order.

    Args:
        root: of the repository.

    Raises:
        ValueError: a row does not have the five columns of its table.
    """
    found: dict[str, Row] = {}
    kind = ""
    for line in (root / PAGE).read_text().splitlines():
        if line.startswith("## "):
            kind = _TABLES.get(line, "")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not kind or not cells[0].isdigit():
            continue
        if len(cells) != 5:
            raise ValueError(
                f"{PAGE}: row {kind} {cells[0]} must have 5 columns (got {len(cells)})"
            )
        name, tests = f"{kind} {cells[0]}", tuple(_TEST.findall(cells[3]))
        found[name] = Row(name=name, tests=tests, planted=cells[4])
    return found
