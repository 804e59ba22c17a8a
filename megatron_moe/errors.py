"""The exceptions for what a user can fix: flags, files, layouts, checkpoints.

Every command turns a `UsageError` into one line on standard error and exit code 2. Anything else is
a defect of the program, and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_moe.console import escape_controls, escape_unprintable

USAGE_EXIT_CODE = 2
ECHO = 200
"""Characters of a value from outside that a line shows."""
_PARTS = {"what": 400, "expected": 4000, "fix": 1000}
"""Characters of the other parts of a line, which are words of this project around names and
messages of others. The valid values of a flag are the longest."""
_OTHERS = 1000
"""Characters of the message of an exception of another library."""


def echoed(value: object, limit: int = ECHO) -> str:
    """Return the `repr` of any value in one line of at most ``limit`` characters.

    The middle is left out, so that the end of a path stays. Neither control characters nor values
    without a `repr`, such as integers of more digits than Python prints, are an error.
    """
    if isinstance(value, str | bytes) and len(value) > limit:  # a repr of it all may not fit
        half = limit // 2
        dots = "..." if isinstance(value, str) else b"..."
        value = value[:half] + dots + value[-half:]  # type: ignore[operator]
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a value of the type {type(value).__name__} that is too large to print"
    return in_line(text, limit)


def in_line(text: str, limit: int) -> str:
    """Return a text of others for a line: controls are escaped, and its middle may be left out."""
    text = escape_controls(_cut(text, limit))
    return _cut(text, limit)  # an escape is longer than what it replaces


def _cut(text: str, limit: int) -> str:
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


class UsageError(Exception):
    """An invalid flag, file or setting, in one line.

    ``--lr must be >= 0 (got -1.0)``: the text is ``what`` must be ``expected`` (got ``found``), and
    after a semicolon the ``fix``, if there is one. Control characters are escaped and long parts
    are cut, ``found`` to `ECHO` characters: they may come from a file of others.

    Args:
        what: the flag, file or setting that is invalid, e.g. ``--num-experts``.
        found: the value that was found.
        expected: what would be valid, e.g. ``a multiple of --expert-model-parallel-size (4)``.
        fix: how to fix it, if that does not follow from ``expected``.
    """

    def __init__(self, what: str, found: object, expected: str, fix: str = "") -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        parts = {"what": what, "expected": expected, "fix": fix}
        what, expected, fix = (in_line(text, _PARTS[name]) for name, text in parts.items())
        line = f"{what} must be {expected} (got {echoed(found)})"
        super().__init__(f"{line}; {fix}" if fix else line)


MOST_ERRORS = 60
"""Lines of `UsageErrors`: more than any public launch script needs, and what a terminal keeps."""


class UsageErrors(UsageError):
    """Several errors of one command line: a first line with their number, then one line each.

    The text has the first `MOST_ERRORS`; `errors` has all.

    Args:
        errors: at least two.
    """

    def __init__(self, errors: Sequence[UsageError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.what, first.found, first.expected, first.fix)
        lines = [f"{len(errors)} errors:", *map(str, errors[:MOST_ERRORS])]
        if len(errors) > MOST_ERRORS:
            lines.append(f"and {len(errors) - MOST_ERRORS} more")
        self.args = ("\n  ".join(lines),)


def raise_errors(errors: Sequence[UsageError]) -> None:
    """Raise what was found: nothing, the error, or all of them as one.

    Raises:
        UsageError: there are any.
    """
    if len(errors) > 1:
        raise UsageErrors(errors)
    if errors:
        raise errors[0]


@contextmanager
def exit_on_usage_error(prog: str, *others: type[Exception]) -> Iterator[None]:
    """Run a command; a usage error ends the process with one line and exit code 2.

    The command can print any text, see `escape_unprintable`.

    Args:
        prog: name of the program, with which the line on standard error begins.
        others: further exceptions that the user can fix here, e.g. ``OSError`` of an output.

    Raises:
        SystemExit: code 2, after a `UsageError` or one of ``others``.
    """
    usage_errors: tuple[type[Exception], ...] = (UsageError, *others)
    escape_unprintable()
    try:
        yield
    except usage_errors as error:
        message = str(error) if isinstance(error, UsageError) else in_line(str(error), _OTHERS)
        print(f"{prog}: error: {message}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None


SHOWN = 60
"""Details that are printed at most; the others are counted."""
_DETAIL = 1000
"""Characters of a detail."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be read, written or used.

    Args:
        what: the flag, file or step that is invalid.
        found: the value that was found.
        expected: what would be valid.
        fix: how to fix it, if that does not follow from ``expected``.
        details: lines before the summary, one for each difference.
    """

    def __init__(
        self,
        what: str,
        found: object,
        expected: str,
        fix: str = "",
        details: Iterable[str] = (),
    ) -> None:
        super().__init__(what, found, expected, fix)
        self.details = tuple(details)
        shown = [in_line(line, _DETAIL) for line in self.details[:SHOWN]]
        if len(self.details) > SHOWN:
            shown.append(f"... and {len(self.details) - SHOWN} more")
        self.args = ("\n".join([*shown, *self.args]),)

    def to_json(self) -> list[Any]:
        """The values of `from_json`, for other ranks."""
        plain = isinstance(self.found, str) or (
            isinstance(self.found, int) and abs(self.found) < 1 << 63
        )
        found = self.found if plain else echoed(self.found)
        return [self.what, found, self.expected, self.fix, list(self.details)]

    @classmethod
    def from_json(cls, values: list[Any]) -> CheckpointError:
        """The inverse of `to_json`."""
        return cls(*values)


class Corrupt(CheckpointError):
    """A damaged file of a checkpoint: not what was written."""


class NonFinite(CheckpointError):
    """Weights or optimizer state with NaN or infinity, which no checkpoint may hold."""


class NoCheckpoint(CheckpointError):
    """A directory in which there is no checkpoint at all."""


@contextmanager
def with_fixes(fixes: Mapping[type[CheckpointError], str]) -> Iterator[None]:
    """Give errors that have no fix the one of the command in which they occur.

    Readers of files do not know which flags a command has.

    Args:
        fixes: by class of the error, exactly.

    Raises:
        CheckpointError: that of the block, with its fix.
    """
    try:
        yield
    except CheckpointError as error:
        fix = fixes.get(type(error), "")
        if error.fix or not fix:
            raise
        values = error.what, error.found, error.expected, fix, error.details
        raise type(error)(*values) from error.__cause__


def merged(errors: list[CheckpointError]) -> CheckpointError:
    """One error for those of several ranks, in which equal texts and equal lines occur once."""
    distinct = {str(error): error for error in errors}
    if len(distinct) == 1:
        return errors[0]
    lines = dict.fromkeys(line for text in distinct for line in text.split("\n"))
    last = list(distinct.values())[-1]
    return type(last)(last.what, last.found, last.expected, last.fix, list(lines)[:-1])
