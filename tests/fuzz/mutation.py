"""Random damage to the content of a file, by bytes and by values of JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**8,
    10**12,
    10**30,
    10**305,
    1e308,
    "",
    "7",
    "x" * 300,
    "a\0b",
    "\ud83d",
    "../x",
    [],
    [1],
    {},
]


def damage(good: bytes, source: random.Random) -> bytes:
    """The content with one fault: bits flipped, cut, joined with itself, or a part replaced."""
    data = bytearray(good or b"\0")
    kind = source.randrange(4)
    if kind == 0:
        for _ in range(source.randint(1, 3)):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    elif kind == 1:
        del data[source.randrange(len(data)) :]
    elif kind == 2:
        place = source.randrange(len(data))
        data[place:place] = data[: source.randrange(len(data))]
    else:
        start = source.randrange(len(data))
        data[start : start + source.randint(1, 40)] = source.randbytes(source.randint(0, 40))
    return bytes(data)


def damaged(good: bytes, source: random.Random, times: int) -> Iterator[bytes]:
    """`damage`, again and again."""
    return (damage(good, source) for _ in range(times))


def replaced(good: bytes, source: random.Random, times: int) -> Iterator[bytes]:
    """A JSON object with some values replaced: every key by every odd value, then at random."""
    values = json.loads(good)
    for key, value in values.items():
        for odd in ODD:
            yield json.dumps({**values, key: odd}).encode()
        for inner in value if isinstance(value, dict) else ():
            changed = {**value, inner: source.choice(ODD)}
            yield json.dumps({**values, key: changed}).encode()
    for _ in range(times):
        keys = source.sample(sorted(values), k=min(3, len(values)))
        yield json.dumps({**values, **{key: source.choice(ODD) for key in keys}}).encode()


def replace_anywhere(value: Any, source: random.Random) -> Any:
    """A JSON value in which one value, at any depth, is another; keys may be as well."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.2:
        return source.choice(ODD)
    if isinstance(value, list):
        place = source.randrange(len(value))
        return [*value[:place], replace_anywhere(value[place], source), *value[place + 1 :]]
    key = source.choice(list(value))
    if source.random() < 0.1:
        return {str(source.choice(ODD)) if k == key else k: v for k, v in value.items()}
    return {**value, key: replace_anywhere(value[key], source)}
