"""Reads text of others: UTF-8 with what editors, shells and other programs add to it.

Text is UTF-8 and lines end at LF, everywhere: a form feed, U+0085 or U+2028 is part of a line. Text
files may begin with a byte order mark (BOM), and lines may end in CR LF; neither is part of the
text. Everything else is an error that names the place: another encoding, undecodable bytes, and
surrogates that JSON escapes or a command line can hold and UTF-8 cannot.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_moe.errors import UsageError, echoed
from megatron_moe.files import describe_start, is_lfs_pointer, read_small

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOM = codecs.BOM_UTF8
LONGEST_RECORD = 1 << 26
"""Bytes of the longest line, block or row of text that is read unless a flag says otherwise: 64
MiB, several times the longest books. Parsed JSON can take twenty times the memory of its text."""
_SHOWN = 60
"""Characters of a value that errors show."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MOST_DIGITS = 300
"""Of an integer in JSON: fewer than the largest float has, so that no conversion overflows."""
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (_MOST_DIGITS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEAD = 64
"""Bytes in which the zero bytes of UTF-16 without a mark are looked for."""


def other_encoding(content: bytes) -> str:
    """Return the name of UTF-16 or UTF-32 if the content evidently is in it, else an empty string.

    By its mark or, without one, by the zero bytes of ASCII characters: `a` is `61 00` or `00 61`.
    """
    for mark, name in _MARKS:
        if content.startswith(mark):
            return name
    even, odd = content[:_HEAD:2], content[1:_HEAD:2]
    for zeros, others, name in ((even, odd, "UTF-16BE"), (odd, even, "UTF-16LE")):
        if len(zeros) > 1 and not any(zeros) and 0 not in others:
            return name
    return ""


def decode(content: bytes, what: str) -> str:
    """Decode UTF-8 without its BOM.

    Args:
        content: of a file, a line or a value.
        what: names it in errors.

    Raises:
        UsageError: the content is not UTF-8; another encoding is named where it is evident.
    """
    # Without a mark UTF-16 can be valid UTF-8, with zero bytes between the characters.
    name = other_encoding(content) if content[:1] > b"\xf0" or 0 in content[:4] else ""
    if name:
        raise UsageError(what, name, "UTF-8", f"iconv -f {name} -t UTF-8 converts it")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = content[error.start :][:8]
        place = f"byte {error.start}"
        if line := content.count(b"\n", 0, error.start):
            place += f", on line {line + 1}"
        raise UsageError(what, found, "UTF-8", f"{error.reason} at {place}") from None


def read_text(path: str | Path, flag: str, expected: str = "a readable text file") -> str:
    """Return the content of a UTF-8 file without its BOM.

    Args:
        path: the file.
        flag: that names it, for errors.
        expected: what the file should be, for errors.

    Raises:
        UsageError: the file cannot be read, or is not UTF-8.
    """
    try:
        content = read_small(path)
    except OSError as error:
        raise UsageError(flag, str(path), expected, str(error)) from None
    if is_lfs_pointer(content):
        raise UsageError(flag, str(path), expected, describe_start(content))
    return decode(content, f"{flag} {path}")


def read_standard_input() -> bytes:
    """Return all bytes of standard input, whose own encoding depends on the locale."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # replaced by a stream of text
        return sys.stdin.read().encode("utf-8", "surrogatepass")
    content: bytes = stream.read()
    return content


def accept_undecodable_input() -> None:
    """Let `input` return undecodable bytes as surrogates, for `argument_text`, without an error."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def full_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1, without line ends and BOM."""
    for number, line in enumerate(content.split(b"\n"), 1):
        text = without_bom(line.removesuffix(b"\r"))
        if text.strip():
            yield number, text


def bounded_lines(
    stream: BinaryIO | io.BufferedIOBase, name: str, most: int, fix: str = ""
) -> Iterator[bytes]:
    """Yield the lines of a stream with their ends, in memory for one of them.

    Compressed files of a few megabytes may hold a line of gigabytes.

    Args:
        stream: of any content.
        name: the file, for errors.
        most: bytes of the longest line.
        fix: of the error.

    Raises:
        UsageError: a line is longer; names it.
    """
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if len(line) > most:
            raise too_long(f"line {number} of {name}", most, fix)
        yield line


def too_long(what: str, most: int, fix: str) -> UsageError:
    """The error for a record that is not read because of its size."""
    return UsageError(f"size of {what}", f"more than {most}", f"<= {most} bytes", fix)


def without_bom(line: bytes) -> bytes:
    """Return a line without the BOM that it has where a file begins, or began before `cat`."""
    return line[len(BOM) :] if line.startswith(BOM) else line


def is_blank(line: bytes) -> bool:
    """Whether a line has no text."""
    return line.isspace() or not without_bom(line).strip()


def json_value(content: bytes | str, finite: bool = True) -> Any:
    r"""Return the value of a JSON file that holds settings or metadata.

    Python's reader accepts more than JSON, and raises more than `ValueError`. Rejected here are
    other encodings than UTF-8, NaN and infinity, floats that become infinity (`1e400`), integers
    that no float holds, half of a surrogate pair (`"\ud83d"`), which no file name and no tokenizer
    can have, and arrays nested deeper than the interpreter's stack. U+DC80 to U+DCFF are accepted:
    they stand for the bytes of a file name that is not UTF-8.

    Args:
        content: in UTF-8, possibly with a BOM.
        finite: False for a caller that checks every number and names its setting; NaN, infinity
            and `1e400` are floats then.

    Raises:
        ValueError: it is not such JSON.
    """
    data = content.encode() if isinstance(content, str) else content.removeprefix(BOM)
    try:
        if _LONG_NUMBER.search(data):
            text = _without_strings(data.decode())
            if _LONG_NUMBER.search(text.encode()):
                raise ValueError(f"it has an integer of more than {_MOST_DIGITS} digits")
        strict: dict[str, Any] = (
            {"parse_float": _finite, "parse_constant": _no_constant} if finite else {}
        )
        value = json.loads(data.decode(), **strict)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"U+{half:04X} in it is half of a surrogate pair") from None
    return value


def _without_strings(text: str) -> str:
    """JSON in which every string is empty."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text, flags=re.DOTALL)


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{shown(text)} in it is not a finite number")


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} in it is not a JSON value")


def toml_value(text: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    As in `json_value`, numbers are finite; integers have 64 bits, which TOML requires of readers.

    Raises:
        ValueError: it is not such TOML.
    """
    try:
        content = tomllib.loads(text, parse_float=_finite)
        _check_integers(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return content


def _check_integers(value: Any) -> None:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_integers(inner)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("it has an integer of more than 64 bits")


def json_of_line(line: bytes, what: str, expected: str = "a JSON object") -> Any:
    """Return the value of a line of JSON Lines.

    Args:
        line: UTF-8, possibly with a BOM.
        what: names the line in errors.
        expected: of the value, for errors.

    Raises:
        UsageError: the line is not UTF-8 or not JSON; shows the text around the fault.
    """
    text = decode(line, what)
    try:
        # NaN, as pandas writes it beside a text, is accepted: only the texts are used.
        return json.loads(text)
    except json.JSONDecodeError as error:
        start = max(0, min(error.pos, len(text.rstrip())) - _SHOWN // 2)
        found = ("..." if start else "") + text[start : start + _SHOWN].rstrip()
        raise UsageError(what, found, expected, str(error)) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting that is too long
        raise UsageError(what, shown(text.strip()), expected, str(error)) from None


def shown(value: object) -> object:
    """Return a value as errors show it: long ones are cut."""
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
    text = echoed(value)
    return value if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def keys_of(record: object) -> str:
    """Describe what a record has instead of the right key or value, for errors."""
    if isinstance(record, dict):
        names = ", ".join(map(str, record)) or "none"
        return f"its keys are {shown(names)}"
    return "it is not an object with keys"


def check_unicode(text: str, what: str) -> str:
    r"""Return a text that UTF-8, and so any tokenizer, can encode.

    JSON can escape half of a surrogate pair, `"\udcb2"`, as truncation of UTF-16 text leaves it.

    Raises:
        UsageError: the text has such a surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - _SHOWN // 2) : error.start + _SHOWN // 2]
        reason = f"U+{ord(text[error.start]):04X} is half of a surrogate pair"
        raise UsageError(what, around, "text that UTF-8 can encode", reason) from None
    return text


def printable(text: str) -> str:
    r"""Return a text in which what is not valid Unicode, as in a Latin-1 file name, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def argument_text(flag: str, value: str) -> str:
    """Return the text of a command-line argument or `input`, which is UTF-8 in any locale.

    Raises:
        UsageError: its bytes are not UTF-8.
    """
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as error:
        raise UsageError(flag, os.fsencode(value), "UTF-8 text", str(error)) from None
    except UnicodeEncodeError:  # not from a command line, but from a program that calls `main`
        return check_unicode(value, flag)
