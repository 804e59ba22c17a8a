"""Numbers from the `config.json` of another program, each checked before it is used.

Counts are bounded: lists are made from them before any tensor is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_moe.errors import CheckpointError

MANY = 1 << 16
"""More layers, experts or heads than any model has."""
SIZE = 1 << 31
"""A larger width or vocabulary than any model has."""


def whole_number(
    values: Mapping[str, Any], key: str, source: str, default: int | None = None, most: int = MANY
) -> int:
    """A field that is a count or a size.

    Args:
        values: contents of ``source``.
        key: the field.
        source: the file, for messages.
        default: what its absence, or null, means; without a default that is refused.
        most: the largest value that is believed.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    found = values.get(key)
    if found is None and default is not None:
        return default
    if type(found) is not int or not 1 <= found <= most:
        expected = f"a whole number of at least 1 and at most {most}"
        raise CheckpointError(f"{key} in {source}", found, expected)
    return found


def number(values: Mapping[str, Any], key: str, source: str, default: float) -> float:
    """A field that is a finite number of at least 0; ``default`` if it is not there.

    Raises:
        CheckpointError: it is something else.
    """
    found = values.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not _fits(found):
        raise CheckpointError(f"{key} in {source}", found, "a finite number of at least 0")
    return float(found)


def _fits(found: float) -> bool:
    try:
        return math.isfinite(found) and found >= 0
    except OverflowError:  # a whole number beyond every float
        return False
