"""Conversations in OpenMoE's template, as ids that are those of tuning with `--objective sft`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.data.objectives.chat import SYSTEM, USER
from megatron_moe.inference.text import Text

RESET = "/reset"
"""What is typed to begin a new conversation."""


class Conversation:
    """What was said so far. Every question and every answer is tokenized by itself, as in tuning.

    Args:
        text: the checkpoint's.
        system: stands before the first question; empty for none.
    """

    def __init__(self, text: Text, system: str = "") -> None:
        self._text = text
        self._system = SYSTEM.format(system) if system else ""
        self._ids: list[int] = []

    def ask(self, question: str) -> list[int]:
        """All ids up to where the answer begins. Nothing is remembered yet."""
        system = "" if self._ids else self._system
        return [*self._ids, *self._text.encode(system + USER.format(question))]

    def remember(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Go on after this answer to what `ask` has given."""
        self._ids = [*prompt, *answer, self._text.eod]
