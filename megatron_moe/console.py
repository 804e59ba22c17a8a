"""Printing on a terminal or into a file: what it cannot write, and what it must not obey."""

from __future__ import annotations

import io
import sys
from typing import TextIO

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
"""Escapes of the control characters: a terminal obeys them, ESC ] sets its title or clipboard."""
_DIRECTIONS = {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Escapes of the characters that reorder the text after them."""
_ESCAPES = {**_CONTROLS, **_DIRECTIONS}
_IN_TEXT = {code: text for code, text in _ESCAPES.items() if chr(code) not in "\n\t"}


def escape_unprintable() -> None:
    r"""Let this process print what the encoding of its standard streams lacks as an escape.

    Where the locale is not UTF-8, and for file names and texts that are not valid Unicode in any,
    `print` would raise an error after the work is done: `schön` becomes `sch\xf6n` in ASCII, and
    byte E9 of a Latin-1 file name becomes `\udce9`. Every command calls this first.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def escape_controls(text: str, *, lines: bool = False) -> str:
    r"""Return a text in which control characters are escapes: ESC is `\x1b`.

    Args:
        text: from a file, a model or another program.
        lines: whether line feeds and tabs stay as they are.
    """
    return text.translate(_IN_TEXT if lines else _ESCAPES)


def print_safely(text: str) -> None:
    """Print a text of others on standard output, see `for_stream`."""
    print(for_stream(text, sys.stdout))


def for_stream(text: str, stream: TextIO) -> str:
    """Return a text as it is written to a stream: without control characters on a terminal.

    A file or a pipe gets the text itself.
    """
    return escape_controls(text, lines=True) if stream.isatty() else text
