"""Run the benchmarks, print one table, write `bench.json`.

    python -m bench.run [--only NAME ...] [--output bench.json] [--strict]

A benchmark is a module of this package with `records() -> list[Record]`, and runs in a process of
its own. If one fails, its error is printed, the others run, and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import bench
from bench._own_process import in_own_process
from bench.record import Record
from megatron_moe.command_line import Parser

HELPERS = {"gpu", "record", "run"}
"""Modules of this package that are not benchmarks of a CPU."""


def names() -> list[str]:
    """The benchmarks of this package, sorted; modules that start with `_` are helpers."""
    found = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name for name in found if name not in HELPERS and not name.startswith("_"))


def table(records: Sequence[Record]) -> str:
    """The records as aligned text."""
    verdict = {True: "met", False: "MISSED", None: ""}
    head = ("benchmark", "value", "unit", "target", "")
    rows = [(r.name, f"{r.value:.4g}", r.unit, r.target, verdict[r.met]) for r in records]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if i == 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, tuple("-" * width for width in widths), *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def collect(wanted: Sequence[str]) -> tuple[list[Record], list[str]]:
    """Records of the benchmarks ``wanted``, and the names of those that failed."""
    records: list[Record] = []
    failed: list[str] = []
    for name in wanted:
        print(f"bench: {name} ...", flush=True)
        try:
            records += in_own_process(_records, name, list(bench.__path__))
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return records, failed


def _records(name: str, folders: list[str]) -> list[Record]:
    bench.__path__ = folders
    found: list[Record] = importlib.import_module(f"bench.{name}").records()
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 if one failed, or with `--strict` if a target was missed."""
    parser = Parser("run.py", (__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target was missed")
    options = parser.parse_args(argv)
    records, failed = collect(options.only)
    rows = [dataclasses.asdict(record) for record in records]
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(records))
    judged = [record.met for record in records if record.met is not None]
    print(f"{sum(judged)} of {len(judged)} targets met; written to {options.output}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or (options.strict and not all(judged)) else 0


if __name__ == "__main__":
    sys.exit(main())
