"""What becomes of Megatron-LM's flags that are no flags of this program.

`megatron_flags.toml` is the table, and explains its format. Each flag is accepted with the meaning
that it has in Megatron-LM (because nothing here differs, or by what other flags set), or is an
error with a reason of its own. Which values are accepted is part of the table: `--normalization
RMSNorm` says what is so here, `--normalization LayerNorm` asks for another model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_suffix(".toml")
_NUMBERS = {"INT": int, "FLOAT": float}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What becomes of some flags; exactly one of `here`, `sets` and `reason` is not empty."""

    flags: tuple[str, ...]
    """Names, with hyphens; `*` at the end stands for any ending."""
    values: tuple[str, ...] | None = None
    """Values that the entry is for. `None`: any if it is an error, else no value."""
    here: str = ""
    """What runs instead of an accepted flag that sets nothing."""
    sets: str = ""
    """Words of this program that mean the same, `{}` for the value."""
    yields_to: tuple[str, ...] = ()
    """Flags beside which `sets` has no effect."""
    reason: str = ""
    """Why the flag is an error."""
    unsaid: str = ""
    """Megatron-LM's meaning of a script without the flag, where that is not possible here."""
    unless: tuple[str, ...] = ()
    """Other flags that say the same."""

    def matches(self, values: Sequence[str]) -> bool:
        """Whether the entry is for these words after the flag.

        Of several words, one makes an error; all must be accepted ones.
        """
        if self.values is None:
            return bool(self.reason) or not values
        if not values:
            return "" in self.values
        fits = (_fits(value, self.values) for value in values)
        return any(fits) if self.reason else all(fits)

    @property
    def expected(self) -> str:
        """Its values in words."""
        words = {"": "no value", "INT": "an integer", "FLOAT": "a number", "*": "a value"}
        return " or ".join(words.get(value, value) for value in self.values or ("",))


def _fits(value: str, values: Sequence[str]) -> bool:
    """Whether a word is one of the values; numbers are compared as numbers."""
    if value in values or "*" in values:
        return True
    number = _number(value, float)
    if number is None:
        return False
    if any(name in values and _number(value, kind) is not None for name, kind in _NUMBERS.items()):
        return True
    return any(number == _number(known, float) for known in values)


def _number(text: str, kind: type[int] | type[float]) -> float | None:
    try:
        return kind(text)
    except ValueError:
        return None


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The table, in its order."""
    loaded = tomllib.loads(TABLE.read_text(encoding="utf-8"))["entry"]
    return tuple(_entry(values) for values in loaded)


def _entry(values: dict[str, str | list[str]]) -> Entry:
    values["flags"] = [flag.replace("_", "-") for flag in values["flags"]]
    found = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    entry = Entry(**found)  # type: ignore[arg-type]
    if sum(map(bool, (entry.here, entry.sets, entry.reason))) != 1:
        raise ValueError(f"{TABLE}: {entry.flags} must have one of here, sets and reason")
    return entry


@functools.cache
def entries_of(flag: str) -> tuple[Entry, ...]:
    """The entries of a flag, those with its whole name first; none for an unknown flag."""
    whole = [entry for entry in entries() if flag in entry.flags]
    return (*whole, *(entry for entry in entries() if _has_pattern(entry, flag)))


def _has_pattern(entry: Entry, flag: str) -> bool:
    return any(name.endswith("*") and flag.startswith(name[:-1]) for name in entry.flags)


def entry_for(flag: str, values: Sequence[str]) -> Entry | None:
    """The entry of a flag with these values.

    Args:
        flag: with hyphens.
        values: the words after it.

    Returns:
        `None` if the table has nothing on the flag.

    Raises:
        UsageError: the flag is in the table, but not with such a value.
    """
    known = entries_of(flag)
    for entry in known:
        if entry.matches(values):
            return entry
    if known:
        raise UsageError(flag, " ".join(values) or True, f"used with {known[0].expected}")
    return None


def accepted_flags() -> list[str]:
    """The whole names of the flags that are accepted with some value."""
    return [
        flag for entry in entries() if not entry.reason for flag in entry.flags if "*" not in flag
    ]
