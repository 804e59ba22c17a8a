"""Conversations as text: the form of a line in a file, and OpenMoE's chat template.

Source of the template: the OpenMoE paper's supervised fine-tuning (arXiv 2402.01739, section on
instruction tuning) and the prompt of its released chat model, which is LLaMA-2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.text import check_unicode, json_of_line, keys_of, shown

SYSTEM = "<<SYS>>\n{}\n<</SYS>>\n\n"
USER = "<s>[INST] {} [/INST]"
"""Ends right before the answer, which follows without a space."""


@dataclass(frozen=True)
class Exchange:
    """A question in the template, and its plain answer."""

    prompt: str
    answer: str


def read_line(line: bytes, key: str, where: str) -> list[Exchange]:
    """Return the exchanges of a conversation.

    A line is a list of turns, or an object that contains it as ``key``. A turn has a `role` and a
    `content`. Turns: an optional system turn, then user and assistant alternate. A last user turn
    without an answer is left out.

    Args:
        line: JSON in UTF-8.
        key: of an object.
        where: names the line in errors.

    Raises:
        UsageError: the line has another form, contains no answer, or text that UTF-8 cannot encode.
    """
    prompts, answers = in_template(_turns(line, key, where), where)
    if not answers:
        raise UsageError(f"number of answers in {where}", 0, ">= 1: a user and an assistant turn")
    return [Exchange(p, a) for p, a in zip(prompts, answers, strict=False)]


def in_template(turns: Sequence[tuple[str, str]], where: str) -> tuple[list[str], list[str]]:
    """Return questions in the template, and plain answers; the last question may have none.

    Args:
        turns: roles and contents: an optional system turn, then user and assistant alternate.
        where: names the conversation in errors.

    Raises:
        UsageError: a role is out of place.
    """
    system = ""
    if turns and turns[0][0] == "system":
        system, turns = SYSTEM.format(turns[0][1]), turns[1:]
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = number + 1 + bool(system)
            raise UsageError(f"role of turn {place} in {where}", role, expected)
    prompts = [USER.format(content) for _, content in turns[::2]]
    if prompts:
        prompts[0] = system + prompts[0]
    return prompts, [content for _, content in turns[1::2]]


def _turns(line: bytes, key: str, where: str) -> Sequence[tuple[str, str]]:
    """Return roles and contents of at least one turn."""
    value: Any = json_of_line(line, where, "JSON")
    if isinstance(value, dict):
        if key not in value:
            expected = f"a list of turns, or an object with the key {key!r}"
            raise UsageError(where, sorted(value), expected, "or set --sft-key")
        value = value[key]
    if not isinstance(value, list) or not value:
        raise UsageError(f"turns in {where}", shown(value), "a non-empty list")
    return [_turn(turn, f"turn {number} in {where}") for number, turn in enumerate(value, 1)]


def _turn(turn: object, where: str) -> tuple[str, str]:
    """Return role and content."""
    expected = "an object with the strings role and content"
    if not isinstance(turn, dict):
        raise UsageError(where, shown(turn), expected)
    for name in ("role", "content"):
        if not isinstance(turn.get(name), str):
            found = shown(turn[name]) if name in turn else None
            raise UsageError(f"{name} of {where}", found, "a string", keys_of(turn))
    return turn["role"], check_unicode(turn["content"], f"content of {where}")
