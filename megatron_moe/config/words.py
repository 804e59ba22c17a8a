"""The words of a command line: each flag with the values after it, and what is wrong with them.

A script of Megatron-LM is translated here into words of this program, by the table of
`megatron_flags.py`. Everything that is wrong is collected, so that one attempt shows all of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.fields import expected_of
from megatron_moe.config.megatron_flags import Entry, accepted_flags, entries_of, entry_for
from megatron_moe.errors import MOST_ERRORS, UsageError

CLOSE = 0.88
"""Similarity (difflib's ratio) from which a known flag is named as the closest. Measured on 1050
flags of Megatron-LM: of those that are no flags here, 1 in 283 is that close to an unrelated flag;
at 0.8 it is 1 in 13, without a cutoff 6 in 7. Slips of one letter are above it."""

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A flag of a command line with its values."""

    flag: str
    """With hyphens; empty for words before the first flag."""
    values: tuple[str, ...]
    words: tuple[str, ...]
    """Both, as they are written."""

    @property
    def text(self) -> str:
        """`--flag value`, for messages."""
        return " ".join((self.flag, *self.values))


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A command line in words of this program."""

    words: tuple[str, ...]
    accepted: dict[str, list[str]]
    """Flags of Megatron-LM that were accepted, by what runs instead."""
    errors: tuple[UsageError, ...]


def split(args: Sequence[str]) -> list[Given]:
    """The flags of a command line, each with the words up to the next flag."""
    groups: list[list[str]] = [[]]
    for arg in args:
        if _is_flag(arg):
            groups.append([])
        groups[-1].append(arg)
    return [_given(group) for group in groups if group]


def _is_flag(word: str) -> bool:
    """A word that begins a flag; a negative number does not."""
    return word in HELP or (word.startswith("--") and word[2:3].isalpha())


def _given(words: list[str]) -> Given:
    if not _is_flag(words[0]):
        return Given(flag="", values=tuple(words), words=tuple(words))
    name, equals, value = words[0].partition("=")
    values = (value, *words[1:]) if equals else tuple(words[1:])
    return Given(flag=name.replace("_", "-"), values=values, words=tuple(words))


def translate(given: Sequence[Given], flags: Mapping[str, Any]) -> Translation:
    """Words of this program that mean the same, and all that have no meaning here.

    Args:
        given: the command line.
        flags: the flags of this program, with the types of their values.
    """
    words: list[str] = []
    accepted: dict[str, list[str]] = {}
    errors: list[UsageError] = []
    rejected: dict[str, list[Given]] = {}
    for item in given:
        if "" in item.values:
            errors.append(_empty(item))
            continue
        try:
            # The closest flag is searched only for lines that are shown: it takes milliseconds.
            entry = _entry(item, flags, hint=len(errors) < MOST_ERRORS)
        except UsageError as error:
            errors.append(error)
            continue
        if entry is None:
            words.extend(item.words)
        elif entry.reason:
            rejected.setdefault(entry.reason, []).append(item)
        else:
            means = entry.sets.format(" ".join(item.values))
            if not any(other.flag in entry.yields_to for other in given):
                words.extend(means.split(" ", 1) if means else ())
            accepted.setdefault(entry.here or means, []).append(item.text)
    errors.extend(_rejected(items, reason, flags) for reason, items in rejected.items())
    return Translation(words=tuple(words), accepted=accepted, errors=tuple(errors))


def _entry(item: Given, flags: Mapping[str, Any], hint: bool) -> Entry | None:
    """What the table says of a flag; `None` for the words of this program."""
    if item.flag in flags or item.flag in ("", *HELP):
        # Of this program's own flags, the table has the values that only Megatron-LM has.
        own = (entry for entry in entries_of(item.flag) if item.flag in entry.flags)
        found = (entry for entry in own if entry.values is not None)
        return next((entry for entry in found if entry.matches(item.values)), None)
    entry = entry_for(item.flag, item.values)
    if entry is None:
        raise _unknown(item.flag, flags, hint)
    return entry


def _empty(item: Given) -> UsageError:
    fix = "an unset variable of a script leaves an empty word; without the flag its default is used"
    return UsageError(item.flag or "argument", "", "given a value", fix)


def _rejected(items: Sequence[Given], reason: str, flags: Mapping[str, Any]) -> UsageError:
    """One error for the flags that have one reason."""
    if len(items) > 1:
        names = ", ".join(item.flag for item in items)
        return UsageError(names, " ".join(item.text for item in items), "left out", reason)
    (item,) = items
    accepted = [entry.expected for entry in entries_of(item.flag) if not entry.reason]
    expected = " or ".join(accepted) or "left out"
    if item.flag in flags:
        expected = expected_of(flags[item.flag])
    return UsageError(item.flag, " ".join(item.values) or True, expected, reason)


def _unknown(name: str, flags: Mapping[str, Any], hint: bool) -> UsageError:
    close = closest(name, [*flags, *accepted_flags()]) if hint else None
    suffix = f", the closest is {close}" if close else ""
    return UsageError("flag", name, f"a known flag{suffix}", "see --help")


def closest(name: str, flags: Collection[str]) -> str | None:
    """The flag that a misspelled one probably is; `None` if none is close."""
    close = difflib.get_close_matches(name, flags, n=1, cutoff=CLOSE)
    return close[0] if close else None
