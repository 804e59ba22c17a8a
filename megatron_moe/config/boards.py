"""The words of `--log-boards`: `NAME=PROJECT`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.moe import added
from megatron_moe.errors import UsageError

FOLDER = Path(__file__).parents[1] / "training" / "boards"
"""Each of its files is a board."""


def boards_of(words: Sequence[str]) -> dict[str, str]:
    """Project by name of the board.

    Raises:
        UsageError: another word, an unknown board, or a board twice.
    """
    found: dict[str, str] = {}
    names = added(FOLDER)
    for word in words:
        name, equals, project = word.partition("=")
        if name not in names or not equals or not project or name in found:
            expected = f"NAME=PROJECT, each NAME once and one of {', '.join(names)}"
            raise UsageError("--log-boards", word, expected)
        found[name] = project
    return found
