"""Every number has a range; each bound holds on the command line and in a configuration file."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import all_flags, parse_args
from megatron_moe.config.fields import (
    AtLeastOne,
    BelowOne,
    ConfigField,
    Flag,
    NonNegative,
    OmittedAtDefault,
    Positive,
    Range,
    fields_of,
)
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import all_fields, flag_of
from megatron_moe.config.validate import check_ranges
from megatron_moe.errors import UsageError

SECTION = {
    name: section
    for section, values in RunConfig().sections.items()
    for name in fields_of(type(values))
}
"""The section of each field."""


def holds_numbers(hint: Any) -> bool:
    """Whether a value of the type is, or contains, a number."""
    return hint in (int, float) or any(map(holds_numbers, typing.get_args(hint)))


def without_range(sections: typing.Iterable[type]) -> list[str]:
    """Fields that hold numbers and have no range, or have one and hold no numbers."""
    return [
        name
        for section in sections
        for name, field in fields_of(section).items()
        if holds_numbers(field.type) != (field.range is not None)
    ]


def test_every_number_has_a_range_and_nothing_else() -> None:
    sections = [type(section) for section in RunConfig().sections.values()]
    assert without_range(sections) == []
    assert sum(field.range is not None for field in all_fields().values()) > 70


def test_a_new_field_without_a_range_is_found() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Section:
        whole: int = 1
        optional: float | None = None
        several: tuple[int, int] = (1, 1)
        given: Annotated[int, AtLeastOne] = 1
        switch: Annotated[bool, AtLeastOne] = False

    assert without_range([Section]) == ["whole", "optional", "several", "switch"]


def test_no_two_sections_have_a_field_or_a_flag_of_the_same_name() -> None:
    sections = RunConfig().sections.values()
    names = [name for section in sections for name in fields_of(type(section))]
    assert len(names) == len(set(names))
    flags = [flag for field in all_fields().values() for flag in field.flags]
    assert len(flags) == len(set(flags))


def bounds(field: ConfigField) -> Iterator[tuple[float, bool]]:
    """Values at and around the bounds that the type can hold, and whether each is valid."""
    limits = field.range
    assert limits is not None
    whole = int in (field.type, *typing.get_args(field.type)) or "tuple" in str(field.type)
    step = 1 if whole else 0.25
    assert limits.low == int(limits.low)
    low = int(limits.low) if whole else limits.low
    yield low - step, False
    yield low, not limits.low_excluded
    yield low + step, True
    if math.isfinite(limits.high):
        yield limits.high, not limits.high_excluded
        yield limits.high + step, False
    if not whole:
        yield math.nan, False
        yield math.inf, False


CASES = [
    (name, value, valid)
    for name, field in all_fields().items()
    if field.range is not None
    for value, valid in bounds(field)
]


def check_case(config: RunConfig, name: str, valid: bool) -> None:
    if valid:
        check_ranges(config)
        return
    with pytest.raises(UsageError) as error:
        check_ranges(config)
    field = all_fields()[name]
    assert error.value.what == field.flag
    assert str(field.range) in error.value.expected


def words_of(name: str, value: float) -> list[str]:
    """A value as words of the command line; the first entry of a tuple has it."""
    if name == "rampup_batch_size":
        return [str(value), "1", "1"]
    if name in ("moe_router_document_pool", "moe_capacity_factor_range"):
        return [str(value), "1"]
    return [str(value)]


MEGATRONS = {("exit_interval", 0), ("exit_duration_in_mins", 0)}
"""Values that the command line takes out: Megatron-LM's scripts use them for no value."""


def rounds() -> list[list[tuple[str, float, bool]]]:
    """The cases, one of each field at a time: that many fit one command line."""
    of_fields: dict[str, list[tuple[str, float, bool]]] = {}
    for case in CASES:
        if case[:2] not in MEGATRONS:
            of_fields.setdefault(case[0], []).append(case)
    alone = of_fields.pop("init_variance_scale")  # excludes --init-method-std
    together = [
        [cases[i] for cases in of_fields.values() if i < len(cases)]
        for i in range(max(map(len, of_fields.values())))
    ]
    return [*together, *([case] for case in alone)]


@pytest.mark.parametrize("cases", rounds())
def test_bounds_hold_on_the_command_line(cases: list[tuple[str, float, bool]]) -> None:
    """Each value is read, and is the one that the check of its field finds or accepts."""
    argv = [word for name, value, _ in cases for word in (flag_of(name), *words_of(name, value))]
    parsed = parse_args(argv).config
    for name, _, valid in cases:
        section = SECTION[name]
        value = getattr(getattr(parsed, section), name)
        alone = replace(getattr(RunConfig(), section), **{name: value})
        check_case(replace(RunConfig(), **{section: alone}), name, valid)


@pytest.mark.parametrize(("name", "value", "valid"), CASES)
def test_bounds_hold_in_a_configuration_file(
    name: str, value: float, valid: bool, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    lists = {
        "rampup_batch_size": [1, 1, value],
        "profile_ranks": [value],
        "moe_router_document_pool": [value, 1],
        "moe_capacity_factor_range": [value, 1],
        "moe_layer_capacity_factors": [value],
        "moe_layer_num_experts": [value],
    }
    content = lists.get(name, value)
    path.write_text(json.dumps({SECTION[name]: {name: content}}))
    check_case(RunConfig.load(path), name, valid)  # as `--config` does


def test_presets_are_in_range() -> None:
    for run in PRESETS.values():
        check_ranges(run)


def test_ranges_read_as_in_error_texts() -> None:
    assert [str(r) for r in (AtLeastOne, NonNegative, Positive)] == [">= 1", ">= 0", "> 0"]
    assert str(BelowOne) == ">= 0 and < 1"
    assert str(Range(0, 2, low_excluded=True)) == "> 0 and <= 2"
    with pytest.raises(UsageError) as error:
        check_ranges(parse_args(["--lr", "-1"]).config)
    assert str(error.value) == "--lr must be >= 0 (got -1.0)"
    with pytest.raises(UsageError) as error:
        check_ranges(parse_args(["--rampup-batch-size", "4", "0", "8"]).config)
    expected = "--rampup-batch-size must be numbers that are each >= 1 (got '4 0 8')"
    assert str(error.value) == expected


RENAMED = {
    "stages": ("--phases", "--stages", "table.toml"),
    "moe_dispatch_impl": ("--kernel-impl", "--moe-dispatch-impl", "reference"),
}
"""Fields whose documented flag has another name: both flags, and a value."""


def test_these_fields_have_another_flag() -> None:
    found = {name: field.flags for name, field in all_fields().items() if len(field.flags) > 1}
    assert found == {name: names[:2] for name, names in RENAMED.items()}
    assert {flag for *flags, _ in RENAMED.values() for flag in flags} <= set(all_flags())


@pytest.mark.parametrize("name", RENAMED)
def test_both_flags_set_the_field_and_errors_name_the_documented_one(name: str) -> None:
    *flags, value = RENAMED[name]
    for flag in flags:
        for argv in (
            [flag, value],
            [f"{flag}={value}"],
            ["--" + flag[2:].replace("-", "_"), value],
        ):
            config = parse_args(argv).config
            assert getattr(getattr(config, SECTION[name]), name) == value
        with pytest.raises(UsageError) as error:
            parse_args([flag])
        assert (error.value.what, error.value.found) == (flags[0], "")
    assert flag_of(name) == flags[0]


def test_a_bad_value_of_an_alias_is_shown() -> None:
    with pytest.raises(UsageError) as error:
        parse_args(["--moe-dispatch-impl", "cutlass"])
    expected = "--kernel-impl must be one of auto, native, triton, reference (got 'cutlass')"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", RENAMED)
def test_both_names_set_the_field_in_a_file_and_files_are_written_with_the_fields(
    name: str, tmp_path: Path
) -> None:
    *flags, value = RENAMED[name]
    path, section = tmp_path / "config.json", SECTION[name]
    keys = [flag[2:].replace("-", "_") for flag in flags]
    for key in keys:
        path.write_text(json.dumps({section: {key: value}}))
        config = parse_args(["--config", str(path)]).config
        assert getattr(getattr(config, section), name) == value
    assert keys[1] == name
    assert name in config.to_dict()[section] and keys[0] not in config.to_dict()[section]
    path.write_text(json.dumps({section: dict.fromkeys(keys, value)}))
    with pytest.raises(UsageError) as error:
        parse_args(["--config", str(path)])
    assert f"settings {keys[0]} and {keys[1]} of {section} of {path}" in str(error.value)


def test_the_help_shows_ranges_and_both_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for shown in (
        "--lr FLOAT >= 0 ",
        "--attention-dropout FLOAT >= 0 and < 1 ",
        "--keep-last {None}|INT >= 1 ",
        "--phases {None}|STR, --stages {None}|STR",
        "--kernel-impl {auto,native,triton,reference}, --moe-dispatch-impl",
    ):
        assert shown in text


def test_a_flag_is_named_after_its_field_unless_the_field_says_otherwise() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Section:
        micro_batch_size: Annotated[int, AtLeastOne] = 1
        other: Annotated[str | None, Flag("--named")] = None

    fields = fields_of(Section)
    assert fields["micro_batch_size"].flags == ("--micro-batch-size",)
    assert fields["other"].flags == ("--named", "--other")
    assert fields["other"].keys == ("named", "other")
    assert fields["other"].type == (str | None)


OMITTED = sorted(name for name, field in all_fields().items() if field.omitted_at_default)
"""Fields that files leave out at their defaults."""
FIRST_RELEASE = {"num_layers", "lr", "data_path", "save", "micro_batch_size", "log_interval"}
"""Some that every file has: earlier releases require them."""
NO_VALUE = {"no": "value"}
"""A value that no field can have."""


def test_files_omit_only_marked_fields_and_only_at_their_defaults() -> None:
    """Files of runs that do not use them are those of releases that did not have them."""
    config = RunConfig()
    written = {name for section in config.to_dict().values() for name in section}
    assert all_fields().keys() - written == set(OMITTED)
    assert written >= FIRST_RELEASE
    for name in OMITTED:
        section = getattr(config, SECTION[name])
        changed = replace(config, **{SECTION[name]: replace(section, **{name: NO_VALUE})})
        assert changed.to_dict()[SECTION[name]][name] == NO_VALUE
        del (rest := changed.to_dict())[SECTION[name]][name]
        # A section of which nothing is written is left out as a whole.
        assert {key: content for key, content in rest.items() if content} == config.to_dict()


@pytest.mark.parametrize("name", OMITTED)
def test_files_with_and_without_an_omitted_field_are_read(name: str, tmp_path: Path) -> None:
    section = SECTION[name]
    path, default = tmp_path / "config.json", getattr(getattr(RunConfig(), section), name)
    values = RunConfig().to_dict()
    path.write_text(json.dumps(values))
    assert RunConfig.load(path) == RunConfig()
    values.setdefault(section, {})[name] = default
    path.write_text(json.dumps(values))
    assert RunConfig.load(path) == RunConfig()
    values[section][name] = NO_VALUE
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError) as error:
        RunConfig.load(path)
    assert error.value.what == f"{name} in {section} of {path}"


def test_a_marked_field_keeps_its_type_range_and_flag() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Section:
        size: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
        other: int = 1

    fields = fields_of(Section)
    assert (fields["size"].type, fields["size"].range) == (int, AtLeastOne)
    assert fields["size"].flag == "--size"
    assert [field.omitted_at_default for field in fields.values()] == [True, False]
