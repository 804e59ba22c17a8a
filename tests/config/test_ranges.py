"""Every numeric flag has a range, and each range is held."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.ranges import COUNT, RANGES, SHARE, Range, check_ranges
from megatron_moe.errors import UsageError


def numeric_fields() -> Iterator[tuple[str, str]]:
    """Section and name of every field that can hold a number."""
    run = RunConfig()
    for section in dataclasses.fields(run):
        values = getattr(run, section.name)
        hints = typing.get_type_hints(type(values))
        for name, hint in hints.items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                yield section.name, name


FIELDS = list(numeric_fields())


def with_value(section: str, name: str, value: Any) -> RunConfig:
    run = RunConfig()
    part = dataclasses.replace(getattr(run, section), **{name: value})
    return dataclasses.replace(run, **{section: part})


def test_every_numeric_field_has_a_range_and_nothing_else() -> None:
    names = [name for _, name in FIELDS]
    assert len(names) == len(set(names)), "a name in two sections would need two rows"
    assert set(names) == set(RANGES)


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_values_outside_are_refused_by_flag(section: str, name: str) -> None:
    allowed = RANGES[name]
    outside = [allowed.low - 1, math.nan, math.inf]
    outside += [allowed.low] if allowed.above else []
    outside += [allowed.high] if allowed.below else []
    for value in outside:
        with pytest.raises(UsageError) as error:
            check_ranges(with_value(section, name, value))
        assert error.value.what == "--" + name.replace("_", "-")


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_values_inside_are_accepted(section: str, name: str) -> None:
    allowed = RANGES[name]
    if not allowed.above:
        check_ranges(with_value(section, name, allowed.low))
    check_ranges(with_value(section, name, allowed.low + 0.5))


def test_presets_are_inside() -> None:
    for run in PRESETS.values():
        check_ranges(run)


def test_ranges_read_as_words() -> None:
    assert str(COUNT) == "at least 1"
    assert str(SHARE) == "at least 0 and below 1"
    assert str(Range(0, 2, above=True)) == "above 0 and at most 2"
