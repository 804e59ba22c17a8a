"""A parser to fuzz: a small valid file, and what opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.errors import UsageError

LONGEST = 20_000
"""Characters of a message: a line for each difference, and none repeats a file."""


@dataclass(frozen=True)
class Opened:
    """A valid file in a folder of its own, and a function that reads it."""

    file: Path
    read: Callable[[], object]


@dataclass(frozen=True)
class Target:
    """A parser by name.

    Args:
        name: in the record and on the command line.
        make: writes a valid instance into an empty folder; called once per process.
        seeds: contents that failed once, or are likely to; each is read or a `UsageError`.
    """

    name: str
    make: Callable[[Path], Opened]
    seeds: tuple[bytes, ...] = ()


def attempt(opened: Opened, content: bytes) -> bool:
    """Read the file with other content; return whether it was accepted.

    Raises:
        Exception: anything but a `UsageError` of one printable line per error, which is a fault of
            the parser.
    """
    opened.file.write_bytes(content)
    try:
        opened.read()
    except UsageError as error:
        text = str(error)
        controls = [c for c in text if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]
        assert not controls, f"control characters in {text!r}"
        assert len(text) < LONGEST, f"a message of {len(text)} characters"
        return False
    return True


HOSTILE = (
    b"",
    b"\x00",
    b"\xff\xfe\x00",
    b"\xed\xa0\xbd",
    b"[" * 100_000,
    b"{}",
    b"[]",
    b"null",
    b'"\\ud83d"',
    b'{"\\ud83d": "\\ud83d", "a\\u0000b": "a\\u0000b"}',
    b'{"a": 1e400, "b": NaN, "c": -Infinity}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"\x1b]0;title\x07": "\\u001b[2J"}',
    b"a = 1e999",
    b"a = " + b"9" * 5000,
    b"a = inf",
    b"a = " + b"[" * 10_000,
)
"""Contents for parsers of text, whatever their format."""


def with_values(template: str, *values: str) -> tuple[bytes, ...]:
    """A text in which `@` is each of some values that are odd in JSON and TOML."""
    odd = ("1e999", "-1", "9" * 30, "9" * 5000, "true", "{}", "[[]]", '"\\u0000"', '""', *values)
    return tuple(template.replace("@", value).encode() for value in odd)
