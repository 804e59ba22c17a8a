"""Tables and plots of docs/experiments.md, from the committed records.

    python -m examples.experiments.document
    python -m examples.experiments.document --check

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` and is written anew. With
`--check` nothing is written, and tables that differ are an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from examples.experiments import tables
from examples.experiments.lab import ROOT

DOCUMENT = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images"

TABLES: Mapping[str, Callable[[], str]] = {
    "setting": tables.setting,
    "context": tables.context_table,
    "early": tables.early_table,
    "drops": tables.drops_table,
    "losses-S": lambda: tables.losses_table("S"),
    "losses-M": lambda: tables.losses_table("M"),
    "routing-S": lambda: tables.routing_table("S"),
    "routing-M": lambda: tables.routing_table("M"),
    "verdicts": tables.verdicts,
    "capacity": tables.capacity_table,
    "saved": tables.saved_table,
    "padding": tables.padding_table,
    "plus": tables.plus_table,
}


def with_tables(text: str) -> str:
    """The document with all tables of today's records.

    Raises:
        ValueError: a marker names no table, or a table has no marker.
    """
    left = set(TABLES)

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"docs/experiments.md: no table is called {name}")
        left.discard(name)
        return f"<!-- begin: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    pattern = r"<!-- begin: (\S+) -->\n.*?<!-- end: \1 -->"
    text = re.sub(pattern, replaced, text, flags=re.DOTALL)
    if left:
        raise ValueError(f"docs/experiments.md: no place for {', '.join(sorted(left))}")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="write tables and plots of docs/experiments.md")
    parser.add_argument("--check", action="store_true", help="compare tables, write nothing")
    options = parser.parse_args(argv)
    text = DOCUMENT.read_text(encoding="utf-8")
    new = with_tables(text)
    if options.check:
        if new != text:
            sys.exit("docs/experiments.md: tables differ from the records; run it without --check")
        return
    DOCUMENT.write_text(new, encoding="utf-8")
    draw(IMAGES)


def draw(folder: Path) -> None:
    """Write the plots as SVG."""
    from examples.experiments import plots

    for name, figure in plots.FIGURES.items():
        figure(folder / f"experiments-{name}.svg")


if __name__ == "__main__":
    main()
