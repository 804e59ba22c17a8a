"""`make planted`: plant each fault in a copy of the repository, and see its test fail.

    python -m tests.planted [--only ROW ...] [--timeout SECONDS] [--record planted.json]

A row is written as in `docs/reliability.md`, `case 14` or `feature-6`. The copy has the tracked
files, and the planted code is what runs, also in the processes that tests start. First the tests
run without any fault, and must pass. Then each fault is planted alone; it is seen if its test
fails. A timeout counts only where the fault can hang. Exits with 1 if a fault was not seen; the
record is written in any case, and keeps what it says of other rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.planted.copied import (
    FAILED,
    PASSED,
    ROOT,
    TIMEOUT,
    check_imports,
    copy_of_tracked,
    run_tests,
    warm_up,
)
from tests.planted.entry import Planted, StaleError
from tests.planted.table import PLANTED

HANG_SECONDS = 120.0
"""For a test that may hang; without the fault it takes seconds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault."""

    row: str
    fault: str
    test: str
    seen: bool
    how: str
    """What the test said, or why the fault does not count as seen."""
    seconds: float


@contextlib.contextmanager
def planted(entry: Planted, copy: Path) -> Iterator[None]:
    """Plant a fault for a while."""
    path = entry.source(copy)
    text = path.read_text()
    try:
        _write(path, entry.planted_in(text))
        yield
    finally:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    """Write a module, and forget its compiled form, which is known by second and size alone."""
    path.write_text(text)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def try_fault(entry: Planted, copy: Path, timeout: float) -> Outcome:
    """Plant a fault and run its test."""
    start = time.monotonic()
    with planted(entry, copy):
        limit = min(timeout, HANG_SECONDS) if entry.hangs else timeout
        code, output = run_tests(copy, [entry.test], limit)
    if code == FAILED:
        seen, how = True, first_error(output)
    elif code == TIMEOUT:
        seen, how = entry.hangs, f"{output}, as it may be" if entry.hangs else output
    else:
        seen, how = False, "passed" if code == PASSED else f"pytest ended with {code}: {output}"
    seconds = round(time.monotonic() - start, 1)
    row, fault, test = entry.row, entry.fault, entry.test
    return Outcome(row=row, fault=fault, test=test, seen=seen, how=how, seconds=seconds)


def first_error(output: str) -> str:
    """The first line of what a failed test said."""
    errors = re.findall(r"^E\s+(.*)$", output, re.MULTILINE)
    return (errors or output.splitlines() or [""])[0][:300]


def selected(names: Sequence[str] | None) -> list[Planted]:
    """The faults of rows, in the order of the table.

    Raises:
        SystemExit: there is no such row.
    """
    if names is None:
        return list(PLANTED)
    wanted = {name.replace("-", " ") for name in names}
    if unknown := wanted - {entry.row for entry in PLANTED}:
        rows = ", ".join(dict.fromkeys(entry.row for entry in PLANTED))
        print(f"planted: error: --only must be of {rows} (got {sorted(unknown)})", file=sys.stderr)
        raise SystemExit(2)
    return [entry for entry in PLANTED if entry.row in wanted]


def line(outcome: Outcome) -> str:
    """One line of the table."""
    seen = "seen" if outcome.seen else "NOT SEEN"
    name = outcome.test.rpartition("::")[2]
    return f"{outcome.row:<11} {seen:<9}{outcome.seconds:>6.0f}  {outcome.fault}: {name}"


def write_record(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the outcomes, beside those of other faults that the file already has."""
    places = {(entry.row, entry.fault): number for number, entry in enumerate(PLANTED)}
    before = json.loads(path.read_text()) if path.exists() else []
    known = {(entry["row"], entry["fault"]): entry for entry in before}
    known |= {(outcome.row, outcome.fault): asdict(outcome) for outcome in outcomes}
    current = sorted(known.keys() & places.keys(), key=lambda key: places[key])
    path.write_text(json.dumps([known[key] for key in current], indent=1) + "\n")


def main() -> None:
    """Run the command; exit code 1 if a fault was not seen, 2 if one cannot be planted."""
    parser = argparse.ArgumentParser("planted", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="ROW", help="rows of docs/reliability.md (all)")
    add("--timeout", type=float, default=600.0, help="seconds for a test (600)")
    add("--record", type=Path, default=ROOT / "planted.json", help="(planted.json)")
    options = parser.parse_args()
    entries = selected(options.only)
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        copy = Path(directory).resolve()
        copy_of_tracked(ROOT, copy)
        try:
            for entry in entries:  # before any takes time
                entry.planted_in(entry.source(copy).read_text())
        except StaleError as error:
            print(f"planted: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        warm_up()
        check_imports(copy)
        tests = list(dict.fromkeys(entry.test for entry in entries))
        code, output = run_tests(copy, tests, options.timeout * len(tests))
        if code != PASSED:
            print(f"{output}\nplanted: error: the tests fail without any fault", file=sys.stderr)
            raise SystemExit(1)
        print(f"{len(tests)} tests pass without a fault", flush=True)
        outcomes: list[Outcome] = []
        for entry in entries:
            outcomes.append(try_fault(entry, copy, options.timeout))
            print(f"{line(outcomes[-1])}\n{'':29}{outcomes[-1].how}", flush=True)
            write_record(options.record, outcomes)
    missed = [outcome for outcome in outcomes if not outcome.seen]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} faults seen")
    for outcome in missed:
        print(line(outcome))
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
