"""The flags of Megatron-LM and of public scripts, as files in `data/` list them."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class ScriptFlag:
    """A flag in the list of public scripts."""

    flag: str
    scripts: int
    """Scripts that use it."""
    values: tuple[tuple[str, int], ...]
    """Its most frequent values and their scripts; "" is the flag alone. Empty for paths and names,
    which the list leaves out."""
    without_effect: int | None
    """Scripts whose value has no effect here, where the list divides the flag by value."""
    fork: bool
    """Whether only a fork of Megatron-LM has it."""


def megatron_flags() -> list[str]:
    """Every flag of Megatron-LM, with hyphens."""
    return _lines("megatron_lm_flags.txt")


def script_flags() -> list[ScriptFlag]:
    """Every flag of the public scripts."""
    rows = csv.DictReader(_lines("script_flags.tsv"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [
        ScriptFlag(
            flag=row["flag"].replace("_", "-"),
            scripts=int(row["scripts"]),
            values=tuple(map(_value, row["values"].split("; "))) if row["values"] else (),
            without_effect=int(found[1])
            if (found := re.search(r"b:(\d+)", row["class"]))
            else None,
            fork=row["origin"] == "fork",
        )
        for row in rows
    ]


def _value(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*) x(\d+)", text)
    assert found is not None, text
    return "" if found[1] == "(none)" else found[1], int(found[2])


def _lines(name: str) -> list[str]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]
