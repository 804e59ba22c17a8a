"""Conversations: the ids that tuning makes of the same turns."""

from __future__ import annotations

import json

from megatron_moe.data.objectives.chat import read_line
from megatron_moe.data.objectives.chat_source import encode
from megatron_moe.inference.chat import Conversation
from megatron_moe.inference.text import Text
from tests.inference.cases import CONFIG, TOKENIZER

TEXT = Text(TOKENIZER, CONFIG.data)
TURNS = [
    ("system", "Be brief."),
    ("user", "What is a mixture?"),
    ("assistant", "A sum."),
    ("user", "Of what?"),
    ("assistant", "Experts."),
]


def _tuned(turns: list[tuple[str, str]]) -> list[list[int]]:
    """Prompts and answers in turn, as the data of `--objective sft` has them."""
    line = json.dumps([{"role": role, "content": content} for role, content in turns])
    return [ids for ids, _ in encode(read_line(line, "messages", "the case"), TOKENIZER)]


def test_a_conversation_has_the_ids_of_tuning() -> None:
    first, answer, second, last = _tuned(TURNS)
    talk = Conversation(TEXT, "Be brief.")
    prompt = talk.ask("What is a mixture?")
    assert prompt == first
    talk.remember(prompt, TEXT.encode("A sum."))
    assert talk.ask("Of what?") == [*first, *answer, *second]
    assert last[-1] == answer[-1] == TEXT.eod


def test_without_a_system_turn() -> None:
    prompt, _ = _tuned(TURNS[1:3])
    talk = Conversation(TEXT)
    assert talk.ask("What is a mixture?") == prompt
    assert talk.ask("What is a mixture?") == prompt, "a question alone is not remembered"
