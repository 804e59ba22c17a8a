"""Conversations as text: what a line of a file may be, and OpenMoE's chat template.

Source of the template: the OpenMoE paper's supervised fine-tuning (arXiv 2402.01739, section on
instruction tuning) and the prompt of its released chat model, which is LLaMA-2's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.errors import UsageError

SYSTEM = "<<SYS>>\n{}\n<</SYS>>\n\n"
USER = "<s>[INST] {} [/INST]"
"""Stands between a question and its answer as well: the answer follows without a blank."""


@dataclass(frozen=True)
class Exchange:
    """A question in its template, and its answer as it is."""

    prompt: str
    answer: str


def read_line(line: str, key: str, where: str) -> list[Exchange]:
    """The exchanges of a conversation.

    A line is a list of turns, or an object whose ``key`` holds it. A turn has a `role` and a
    `content`. Turns: a system turn or none, then user and assistant in turn. A last user turn
    without an answer is left out.

    Args:
        line: JSON.
        key: of an object.
        where: names the line in errors.

    Raises:
        UsageError: the line is anything else, or nothing in it is answered.
    """
    prompts, answers = in_template(_turns(line, key, where), where)
    if not answers:
        raise UsageError(f"answers in {where}", 0, "a user turn and an assistant turn at least")
    return [Exchange(p, a) for p, a in zip(prompts, answers, strict=False)]


def in_template(turns: Sequence[tuple[str, str]], where: str) -> tuple[list[str], list[str]]:
    """Questions in their template, and answers as they are; the last question may have none.

    Args:
        turns: roles and contents: a system turn or none, then user and assistant in turn.
        where: names the conversation in errors.

    Raises:
        UsageError: a role is another one.
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


def _turns(line: str, key: str, where: str) -> Sequence[tuple[str, str]]:
    """Roles and contents, not empty."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(where, line.strip()[:40], "JSON", str(error)) from None
    if isinstance(value, dict):
        if key not in value:
            expected = f"a list of turns, or an object with the key {key!r}"
            raise UsageError(f"keys in {where}", sorted(value), expected, "or give --sft-key")
        value = value[key]
    if not isinstance(value, list) or not value:
        raise UsageError(f"turns in {where}", str(value)[:40], "a list of turns, not empty")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(name), str) for name in ("role", "content")
        ):
            expected = "an object with the texts role and content"
            raise UsageError(f"turn {number} in {where}", str(turn)[:40], expected)
    return [(turn["role"], turn["content"]) for turn in value]
