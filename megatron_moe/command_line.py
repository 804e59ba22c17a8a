"""The argument parser of the tools: an invalid command line is one line and exit code 2.

argparse prints its usage block before an error, which hides the error below ten lines of flags.
This parser prints the line of a `UsageError` instead: what is invalid, what would be valid and what
was found. All unknown flags are listed at once, with the closest known flag where one is close.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

_CLOSE = 0.75
"""Similarity (`difflib`) from which a known flag is suggested; `--inptu` has 0.86 to `--input`."""
_TYPES = {int: "an integer", float: "a number"}
_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one line. Flags cannot be abbreviated.

    Args:
        prog: name of the command, e.g. ``merge_datasets.py``.
        description: shown by `--help` with its line breaks, typically the module's docstring.
        epilog: shown last by `--help`, likewise.
        add_help: whether there is a `--help`.
    """

    def __init__(
        self,
        prog: str,
        description: str | None = None,
        epilog: str | None = None,
        add_help: bool = True,
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
            exit_on_error=False,  # raises `ArgumentError`, which knows the flag
        )

    def parse_args(  # type: ignore[override]  # argparse has one overload per type of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The values of the flags.

        Raises:
            SystemExit: code 2 after an error, 0 after `--help`.
        """
        words = list(sys.argv[1:] if args is None else args)
        unknown = list(dict.fromkeys(self._unknown_flags(words)))
        if unknown and not {"-h", "--help"} & set(words):
            self._end(self._unknown(unknown))
        options, others = self.parse_known_args(words, namespace)
        if others:
            self._end(UsageError("argument", " ".join(others), "preceded by a flag", self._help()))
        return options

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As `parse_args`; flags that are not known are returned."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            name = error.argument_name or "the command line"
            self._end(_usage_error(name.split("/")[0], error.message, self._help()))

    def error(self, message: str) -> NoReturn:
        """End the process with one line; before Python 3.13 argparse calls it for missing flags."""
        self._end(_usage_error("the command line", message, self._help()))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # argparse says `invalid int value`; the word is kept here, where it is known.
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if action.type in _TYPES:
                self._end(UsageError(_name(action), arg_string, _TYPES[action.type]))
            raise error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            expected = f"one of {', '.join(map(str, action.choices))}"
            self._end(UsageError(_name(action), value, expected))

    def _unknown_flags(self, words: Sequence[str]) -> Iterator[str]:
        """The flags that this parser does not have, as argparse distinguishes flags from values."""
        for word in words:
            if word == "--":
                return
            if len(word) < 2 or word[0] != "-" or _NUMBER.match(word):
                continue
            name = word.partition("=")[0]
            if name not in self._option_string_actions and " " not in name:
                yield name

    def _unknown(self, names: Sequence[str]) -> UsageError:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        closest = []
        for name in names:
            spelled = name.replace("_", "-")
            for found in difflib.get_close_matches(spelled, known, n=1, cutoff=_CLOSE):
                closest.append(found if len(names) == 1 else f"{found} for {name}")
        hint = f"the closest is {', '.join(closest)}; " if closest else ""
        what = "flag" if len(names) == 1 else "flags"
        expected = f"{'one' if len(names) == 1 else 'some'} of {self.prog}'s"
        return UsageError(what, ", ".join(names), expected, hint + self._help())

    def _help(self) -> str:
        return f"see {self.prog} --help"

    def _end(self, error: UsageError) -> NoReturn:
        print(f"{self.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE)


def _name(action: argparse.Action) -> str:
    """The first name of a flag; of a positional argument its name in the help."""
    return action.option_strings[0] if action.option_strings else str(action.dest)


def _usage_error(what: str, message: str, fix: str) -> UsageError:
    """A text of argparse, which has no other sign of what is wrong, as a usage error."""
    if required := re.match(r"the following arguments are required: (.*)", message):
        return UsageError(required[1], None, "given", fix)
    if ignored := re.match(r"ignored explicit argument (.*)", message):
        return UsageError(what, ignored[1].strip("'\""), "given without a value", fix)
    if number := re.match(r"expected (.*?) arguments?$", message):
        plural = "" if number[1] in ("one", "at least one", "at most one") else "s"
        return UsageError(what, None, f"followed by {number[1]} value{plural}", fix)
    return UsageError(what, message, "as in the help", fix)
