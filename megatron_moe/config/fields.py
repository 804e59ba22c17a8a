"""What a field carries besides its type: its range, its flag, whether files omit it at its default.

All are metadata of the field's annotation, so that a field is declared in one place:

    lr: Annotated[float, NonNegative] = 3e-4
    stages: Annotated[str | None, Flag("--phases")] = None
    moe_router_type: Annotated[RouterType, OmittedAtDefault] = "linear"

The command line, `config.json` and `validate` read them with `fields_of`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_moe.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds. `None` is always valid where the type allows it.

    Of a tuple, every entry must be in the range.
    """

    low: float
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False

    def contains(self, value: float) -> bool:
        """Whether ``value`` is in the range. NaN and infinity never are."""
        if not -_LARGEST <= value < _LARGEST and isinstance(value, int):
            return False
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        # NaN compares false with everything; infinity would pass a range without an upper bound.
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'>' if self.low_excluded else '>='} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'<' if self.high_excluded else '<='} {self.high:g}"


_LARGEST = 1 << 63
"""Integers of a configuration have 64 bits, as tensors' sizes and C++ libraries have."""

AtLeastOne = Range(1)
"""Sizes, counts and intervals."""
NonNegative = Range(0)
Positive = Range(0, low_excluded=True)
BelowOne = Range(0, 1, high_excluded=True)
"""Probabilities and decay rates: 1 would drop, or keep, everything."""


@dataclass(frozen=True)
class Flag:
    """The documented flag of a field that is not named after the field.

    The flag named after the field stays valid, and `config.json` keeps the field's name as its key:
    scripts and saved files from before a flag was renamed still work, and so do older releases on
    new files.
    """

    name: str
    """With its dashes, e.g. `--phases`."""


@dataclass(frozen=True)
class AbsentMeans:
    """What a file means that lacks the field, if that is not the field's default.

    For a default that changes the results of runs: a section of a file without the key is from a
    release before the field, and keeps the meaning that it had. `RunConfig.to_dict` leaves the
    field out while it has this value.
    """

    value: Any


class OmittedAtDefault:
    """Marks a field that `RunConfig.to_dict` leaves out while it has the default of its section.

    For fields that are added after a release: files of runs that do not use them stay equal to
    those of older releases, which can read them.
    """


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """A field of a section of the configuration."""

    name: str
    """Of the attribute, and the key in `config.json`."""
    type: Any
    """Without metadata."""
    flag: str
    """The documented flag: help, errors and logs name it."""
    range: Range | None
    """Of its numbers; `None` for a field that has none."""
    omitted_at_default: bool = False
    """Whether it is marked with `OmittedAtDefault`."""
    absent: AbsentMeans | None = None
    """What a section of a file without it means, if not its default."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Every flag that sets the field, the documented one first."""
        return tuple(dict.fromkeys((self.flag, flag_named(self.name))))

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that sets the field in a configuration file; files are written with the last.

        The others are the names of its flags, for files that are written by hand.
        """
        return tuple(flag[2:].replace("-", "_") for flag in self.flags)

    def check(self, value: Any) -> None:
        """Check a value against the range.

        Raises:
            UsageError: names the flag and the range.
        """
        if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            raise UsageError(self.flag, value, "an integer of 64 bits")
        if isinstance(value, float) and self.range is None and not math.isfinite(value):
            raise UsageError(self.flag, value, "a finite number")
        if self.range is None or value is None:
            return
        if not isinstance(value, tuple):
            if not self.range.contains(value):
                raise UsageError(self.flag, value, str(self.range))
        elif not all(map(self.range.contains, value)):
            found = " ".join(map(str, value))
            raise UsageError(self.flag, found, f"numbers that are each {self.range}")


def fields_of(section: type[Any]) -> dict[str, ConfigField]:
    """The fields of a section of the configuration by name, in their order."""
    return _fields_of(section)  # type: ignore[arg-type]  # a class is hashable, whatever mypy says


@functools.cache
def _fields_of(section: type[Any]) -> dict[str, ConfigField]:
    plain = typing.get_type_hints(section)
    annotated = typing.get_type_hints(section, include_extras=True)
    names = [field.name for field in dataclasses.fields(section)]
    return {name: _field(name, plain[name], annotated[name]) for name in names}


def _field(name: str, plain: Any, annotated: Any) -> ConfigField:
    kind = typing.get_origin(annotated)
    metadata = annotated.__metadata__ if kind is Annotated else ()
    ranges = [item for item in metadata if isinstance(item, Range)]
    flags = [item.name for item in metadata if isinstance(item, Flag)]
    return ConfigField(
        name=name,
        type=plain,
        flag=flags[0] if flags else flag_named(name),
        range=ranges[0] if ranges else None,
        omitted_at_default=OmittedAtDefault in metadata,
        absent=next((item for item in metadata if isinstance(item, AbsentMeans)), None),
    )


def flag_named(name: str) -> str:
    """The flag that a name means: `micro_batch_size` -> `--micro-batch-size`."""
    return "--" + name.replace("_", "-")


def expected_of(hint: Any) -> str:
    """A type in the words of a command line: `an integer`, `one of adam, sgd`."""
    if hint in _WORDS:
        return _WORDS[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        return f"values, each {expected_of(arguments[0])}"
    return " or ".join(expected_of(argument) for argument in arguments)


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "no value (--flag or --no-flag)",
    type(None): "None",
}
