"""How a command ends after a usage error: one line on standard error, exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def usage_error(
    main: Callable[[Sequence[str]], object],
    words: Sequence[str],
    capture: pytest.CaptureFixture[str],
) -> str:
    """The line on standard error of a command that ends with code 2 before it prints anything."""
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    printed = capture.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err
