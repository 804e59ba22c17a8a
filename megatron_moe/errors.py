"""The one exception for what a user can mend: bad flags, bad files, bad layouts.

Every command line turns a `UsageError` into one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
        line = f"{what} is {found!r}, expected {expected}"
        super().__init__(f"{line}; {fix}" if fix else line)


@contextmanager
def exit_on_mistake(prog: str, *others: type[Exception]) -> Iterator[None]:
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
