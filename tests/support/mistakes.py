"""What a command does with a mistake of the user's: one line, exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def refused(
    main: Callable[[Sequence[str]], object],
    words: Sequence[str],
    capture: pytest.CaptureFixture[str],
) -> str:
    """The one line on standard error with which a command ends with code 2 before it prints."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    printed = capture.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err
