"""Conversations in OpenMoE's template, as ids that are those of tuning with `--objective sft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_moe.data.objectives.chat import SYSTEM, USER, in_template
from megatron_moe.errors import UsageError
from megatron_moe.inference.text import Text

RESET = "/reset"
"""What is typed to begin a new conversation."""
BEGINS, ENDS = "\ufdd0", "\ufdd1"
"""Where an answer begins and ends in a conversation that is one text. No text has these: Unicode
keeps them for programs' own use (noncharacters)."""


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


def as_text(turns: Sequence[Mapping[str, str]], *, to_answer: bool) -> str:
    """A conversation as one text, which `ids_of` makes the ids of tuning of.

    Args:
        turns: each with a `role` and a `content`, as in tuning data.
        to_answer: the last turn is a question to be answered; if not, an answer to be continued.

    Raises:
        UsageError: turns in another order, or a content with marks of its own.
    """
    where = "a task's conversation"
    for number, turn in enumerate(turns, 1):
        if BEGINS in turn["content"] or ENDS in turn["content"]:
            found, expected = turn["content"][:40], "no U+FDD0 or U+FDD1, which no text has"
            raise UsageError(f"content of turn {number} in {where}", found, expected)
    questions, answers = in_template([(turn["role"], turn["content"]) for turn in turns], where)
    if len(questions) != len(answers) + to_answer:
        found = turns[-1]["role"] if turns else "missing"
        raise UsageError(f"last turn in {where}", found, "user" if to_answer else "assistant")
    said = [*answers, ""] if to_answer else answers
    return ENDS.join(q + BEGINS + a for q, a in zip(questions, said, strict=True))


def ids_of(text: Text, conversation: str) -> list[int]:
    """Ids of a text from `as_text`, or of any other text, in which there are no marks.

    Questions and answers are tokenized each by itself, and an end of document follows an answer
    that is over. A continuation that is appended to the text is part of its last answer.
    """
    ids: list[int] = []
    for number, exchange in enumerate(conversation.split(ENDS)):
        ids += [text.eod] if number else []
        for part in exchange.split(BEGINS):
            ids += text.encode(part)
    return ids


def answer_of(conversation: str) -> str | None:
    """What is already said of the last answer; `None` for a text that is no conversation."""
    _, begins, said = conversation.rpartition(BEGINS)
    return said if begins else None
