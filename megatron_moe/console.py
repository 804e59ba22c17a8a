"""Printing on a terminal or into a file whose encoding cannot write every character."""

from __future__ import annotations

import io
import sys


def escape_unprintable() -> None:
    r"""Let this process print what the encoding of its standard streams lacks as an escape.

    Where the locale is not UTF-8, and for file names and texts that are not valid Unicode in any,
    `print` would raise an error after the work is done: `schön` becomes `sch\xf6n` in ASCII, and
    byte E9 of a Latin-1 file name becomes `\udce9`. Every command calls this first.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
