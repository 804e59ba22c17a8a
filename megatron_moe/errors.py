"""The one exception for what a user can mend: bad flags, bad files, bad layouts.

Every command line turns a `UsageError` into one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

USAGE_EXIT_CODE = 2


class UsageError(Exception):
    """A mistake in what the user asked for, said in one line.

    Args:
        what: the flag, file or setting that is wrong, e.g. ``--num-experts``.
        found: the value that was found.
        expected: what would be valid, e.g. ``a multiple of --expert-model-parallel-size (4)``.
        fix: how to mend it, if that does not follow from ``expected``.
    """

    def __init__(self, what: str, found: object, expected: str, fix: str = "") -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        line = f"{what} must be {expected} (got {found!r})"
        super().__init__(f"{line}; {fix}" if fix else line)


@contextmanager
def exit_on_usage_error(prog: str, *others: type[Exception]) -> Iterator[None]:
    """Run a command's work; a mistake ends the process with one line and exit code 2.

    Args:
        prog: what the line on standard error begins with.
        others: exceptions that are the user's to mend here as well, e.g. ``OSError`` of an output.

    Raises:
        SystemExit: code 2, after a `UsageError` or one of ``others``.
    """
    mistakes: tuple[type[Exception], ...] = (UsageError, *others)
    try:
        yield
    except mistakes as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None


SHOWN = 60
"""Details printed at most; the rest is counted."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be read, written or used.

    Args:
        what: the flag, file or step that is wrong.
        found: what was found.
        expected: what would be valid.
        fix: how to mend it.
        details: lines that go before the summary, one per difference.
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
        shown = list(self.details[:SHOWN])
        if len(self.details) > SHOWN:
            shown.append(f"... and {len(self.details) - SHOWN} more")
        self.args = ("\n".join([*shown, *self.args]),)

    def to_json(self) -> list[Any]:
        """What `from_json` takes, to tell other ranks."""
        found = self.found if isinstance(self.found, int | str) else str(self.found)
        return [self.what, found, self.expected, self.fix, list(self.details)]

    @classmethod
    def from_json(cls, values: list[Any]) -> CheckpointError:
        """The inverse of `to_json`."""
        return cls(*values)


_ANOTHER = "another step, with --ckpt-step or --checkpoint-fallback, may be whole"


class Corrupt(CheckpointError):
    """A file of a checkpoint that is not what was written: another one may be whole."""

    def __init__(
        self,
        what: str,
        found: object,
        expected: str,
        fix: str = _ANOTHER,
        details: Iterable[str] = (),
    ) -> None:
        super().__init__(what, found, expected, fix or _ANOTHER, details)


def merged(errors: list[CheckpointError]) -> CheckpointError:
    """One error that says what several ranks say; the same thing once."""
    distinct = {str(error): error for error in errors}
    if len(distinct) == 1:
        return errors[0]
    lines = dict.fromkeys(line for text in distinct for line in text.split("\n"))
    last = list(distinct.values())[-1]
    return type(last)(last.what, last.found, last.expected, last.fix, list(lines)[:-1])
