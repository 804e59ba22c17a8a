"""Error lines: what they show of values from outside, and in which form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.errors import (
    MOST_ERRORS,
    CheckpointError,
    UsageError,
    UsageErrors,
    echoed,
    exit_on_usage_error,
    raise_errors,
)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "found",
    ["x" * 10**6, b"x" * 10**6, list(range(10**5)), {"k": "v" * 10**6}, Path("x" * 999)],
    ids=["text", "bytes", "list", "object", "path"],
)
def test_long_values_are_cut_in_the_middle(found: Any) -> None:
    line = str(UsageError("--flag", found, "short"))
    assert len(line) <= len("--flag must be short (got )") + 200
    assert "..." in line
    assert line.startswith("--flag must be short (got ")


def test_the_end_of_a_path_stays() -> None:
    assert "config.json" in str(UsageError("--load", f"/{'d' * 400}/config.json", "a file"))
    assert str(UsageError(f"key in /{'d' * 999}/config.json", 1, "2")).count("config.json") == 1


@pytest.mark.parametrize(
    "found", [10**5000, [10**5000], nested(100_000)], ids=["number", "list", "nested"]
)
def test_values_that_python_does_not_print(found: Any) -> None:
    assert "too large to print" in str(UsageError("--flag", found, "another"))
    error = CheckpointError("--flag", found, "another")
    again = CheckpointError.from_json(json.loads(json.dumps(error.to_json())))
    assert "too large to print" in str(again)


def test_control_characters_are_escaped_everywhere() -> None:
    hostile = "\x1b]0;title\x07\r\n\x9b31m\u202etxt"
    error = CheckpointError(hostile, hostile, hostile, hostile, [hostile])
    detail, line = str(error).split("\n")
    for text in (detail, line):
        assert text.isprintable()
        assert r"\x1b]0;title\x07\r\n\x9b31m\u202etxt" in text


def test_messages_of_other_libraries_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), exit_on_usage_error("tool", OSError):
        raise OSError("\x1b[2J" + "x" * 10_000)
    printed = capsys.readouterr().err
    assert printed.startswith(r"tool: error: \x1b[2J")
    assert len(printed) < 1100
    assert printed.count("\n") == 1


def test_usual_lines_are_as_they_were() -> None:
    line = str(UsageError("--lr", -1.0, ">= 0", "give another"))
    assert line == "--lr must be >= 0 (got -1.0); give another"
    assert echoed("schön\n") == r"'schön\n'"
    assert echoed(sys.maxsize) == str(sys.maxsize)


def test_of_many_errors_the_first_are_printed() -> None:
    errors = [UsageError(f"--flag-{number}", None, "known") for number in range(500)]
    with pytest.raises(UsageErrors) as raised:
        raise_errors(errors)
    lines = str(raised.value).splitlines()
    assert lines[0] == "500 errors:" and lines[-1] == f"  and {500 - MOST_ERRORS} more"
    assert len(lines) == MOST_ERRORS + 2 and len(raised.value.errors) == 500
