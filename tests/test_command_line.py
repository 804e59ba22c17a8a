"""Invalid command lines of the tools: one line, exit code 2, no usage block."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.command_line import Parser
from tests.support.usage_errors import usage_error

TOOLS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[1] / "tools").glob("*.py")
    # The flags of unigram_loss.py are those of training, which tests/config/test_cli.py covers, and
    # so are those that plan_layout.py and check_environment.py do not know themselves
    # (tests/tools); those of torchrun.py are torchrun's.
    if path.stem
    not in (
        *("__init__", "check_architecture", "check_environment", "plan_layout"),
        *("preprocess_data", "torchrun", "unigram_loss"),
    )
)


def toy() -> Parser:
    parser = Parser("toy.py", "A toy.")
    add = parser.add_argument
    add("folder", type=Path)
    add("--input", "--in", nargs="+", required=True)
    add("--size", type=int, choices=(1, 2, 3))
    add("--share", type=float)
    add("--pair", nargs=2)
    add("--json", action="store_true")
    return parser


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("x", "--input/--in must be given (got None); see toy.py --help"),
        ("", "folder, --input/--in must be given (got None); see toy.py --help"),
        ("x --input", "--input must be followed by at least one value (got None); see "),
        ("x --in a --pair 1", "--pair must be followed by 2 values (got None); see toy.py --help"),
        ("x --in a --size b", "--size must be an integer (got 'b')"),
        ("x --in a --size 4", "--size must be one of 1, 2, 3 (got 4)"),
        ("x --in a --share 1,5", "--share must be a number (got '1,5')"),
        ("x --in a --json=yes", "--json must be given without a value (got 'yes')"),
        ("x --in=a y", "argument must be preceded by a flag (got 'y')"),
        ("--in a -- x -y", "argument must be preceded by a flag (got '-y')"),
        (
            "x --inptu a",
            "flag must be one of toy.py's (got '--inptu'); the closest is --input;",
        ),
        # A suggestion that has nothing to do with the flag would mislead.
        ("x --in a --loader=b", "flag must be one of toy.py's (got '--loader'); see toy.py --help"),
        # All of them at once, and before what else is wrong.
        (
            "--sise 3 --seed 1 --shares 2",
            "flags must be some of toy.py's (got '--sise, --seed, --shares'); the closest is "
            "--size for --sise, --share for --shares; see toy.py --help",
        ),
        # Abbreviations would change their meaning when a flag is added.
        ("x --inp a", "flag must be one of toy.py's (got '--inp'); the closest is --in; see"),
    ],
)
def test_an_invalid_command_line_is_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = usage_error(toy().parse_args, words.split(), capsys)
    assert error.startswith(f"toy.py: error: {line}")


def test_values_that_look_like_flags_are_values() -> None:
    words = ["x", "--share", "-2.5", "--input", "-3", "- a", "--in b", "-"]
    options = toy().parse_args(words)
    assert options.share == -2.5
    assert options.input == ["-3", "- a", "--in b", "-"]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_names_an_unknown_flag_in_one_line(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Any = importlib.import_module(f"tools.{tool}").main
    error = usage_error(main, ["--no-such-flag", "1"], capsys)
    fix = f"see {tool}.py --help"
    expected = f"{tool}.py: error: flag must be one of {tool}.py's (got '--no-such-flag'); {fix}\n"
    assert error == expected
