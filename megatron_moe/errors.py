"""The one exception for what a user can mend: bad flags, bad files, bad layouts.

Every command line turns a `UsageError` into one line on standard error and exit code 2.
"""

from __future__ import annotations

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
