"""What an analysis found: tables, arrays and numbers, on disk as CSV, JSON and NPZ.

A result is complete or absent: its `result.json` is written last, and names what decided it, so
that an interrupted analysis continues and a changed one is computed again.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.checkpoint.disk import read_json, replace_bytes

RESULT = "result.json"
ARRAYS = "arrays.npz"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Named columns of equal length; one CSV file.

    Args:
        name: file name without suffix.
        columns: values by column name; `None` is an empty cell.
        about: what a row is, and the units.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    about: str = ""

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Rows of cells."""
        return list(zip(*self.columns.values(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one analysis found for one checkpoint, or for several together.

    Args:
        analysis: key of the analysis.
        numbers: headline figures by name; NaN where a statistic is undefined.
        tables: for people and other programs.
        arrays: what the plots are drawn from, by name.
        notes: limits of this result, e.g. that there were few tokens; one sentence each.
    """

    analysis: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_result(folder: Path, result: Result, fingerprint: str) -> None:
    """Write a result's files; an older result there is replaced.

    Args:
        folder: of this analysis and checkpoint.
        result: what to write.
        fingerprint: of what decided it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    for table in result.tables:
        write_table(folder / f"{table.name}.csv", table)
    binary = io.BytesIO()
    np.savez_compressed(binary, **result.arrays)  # type: ignore[arg-type]
    replace_bytes(folder / ARRAYS, binary.getvalue())
    values = {
        "analysis": result.analysis,
        "fingerprint": fingerprint,
        "numbers": {name: _number(value) for name, value in result.numbers.items()},
        "notes": list(result.notes),
        "tables": [
            {
                "name": table.name,
                "about": table.about,
                "columns": {k: [_number(v) for v in column] for k, column in table.columns.items()},
            }
            for table in result.tables
        ],
    }
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    replace_bytes(folder / RESULT, text.encode())


def write_table(path: Path, table: Table) -> None:
    """Write a table as CSV."""
    cells = io.StringIO(newline="")
    writer = csv.writer(cells)
    writer.writerow(table.columns)
    writer.writerows([_cell(value) for value in row] for row in table.rows)
    replace_bytes(path, cells.getvalue().encode("utf-8", "backslashreplace"))


def read_result(folder: Path, fingerprint: str) -> Result | None:
    """The result in a folder; `None` if there is none, or one that something else decided."""
    if not (folder / RESULT).is_file():
        return None
    values = read_json(folder / RESULT)
    if values.get("fingerprint") != fingerprint:
        return None
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        loaded = {name: arrays[name] for name in arrays.files}
    return Result(
        analysis=values["analysis"],
        numbers={k: math.nan if v is None else v for k, v in values["numbers"].items()},
        tables=[
            Table(name=t["name"], about=t["about"], columns=t["columns"]) for t in values["tables"]
        ],
        arrays=loaded,
        notes=values["notes"],
    )


def _number(value: Any) -> Any:
    """A JSON value: NumPy scalars as Python's, NaN and infinity as null."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    value = _number(value)
    return "" if value is None else value
