"""The demo conversations: what is asked and answered, each answer once, the same each time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_moe.data.objectives.chat import read_line
from tests.support.usage_errors import usage_error
from tools.make_demo_chat import (
    SYSTEM,
    choose,
    conversation,
    conversations_of_module,
    conversations_of_topics,
    first_paragraph,
    main,
)

MODULE = '''
def add(a, b=1, *rest):
    """Add all numbers that it
    is given.

    A second paragraph.
    """

def undocumented(x): ...

class Pile:
    """A pile of things, one on the other."""

    def push(self, thing: int) -> None:
        """Put a thing on top of the pile."""

    def pop(self):
        """Take the uppermost thing away again."""
'''


def _questions(turns: list[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in turns if turn["role"] == "user"]


def test_functions_and_classes_of_a_module_by_hand():
    add, undocumented, pile = conversations_of_module(ast.parse(MODULE), "a.b")
    assert add == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "What does a.b.add(a, b=1, *rest) do?"},
        {"role": "assistant", "content": "Add all numbers that it is given."},
    ]
    assert _questions(undocumented) == []
    assert _questions(pile) == [
        "What is the class Pile of the module a.b?",
        "What does Pile.push(self, thing: int) do?",
    ]


def test_answers_too_short_or_too_long_are_left_out():
    exchanges = [("a", "x" * 19), ("b", "x" * 20), ("c", "x" * 600), ("d", "x" * 601), None]
    assert _questions(conversation(exchanges)) == ["b", "c"]


def test_paragraphs_are_one_line():
    assert first_paragraph("\n one\n   two  three\n\nfour") == "one two three"


def test_topics_answer_with_their_first_paragraph_and_not_their_title():
    found = {_questions(turns)[0]: turns for turns in conversations_of_topics() if turns[1:]}
    turns = found["What does help('assert') say?"]
    assert turns[2]["content"].startswith("Assert statements are a convenient way to insert")


def test_no_answer_is_in_two_conversations():
    twice = [conversation([("a", "the same answer to both")]), conversation([])]
    twice += [conversation([("b", "the same answer to both")])]
    assert len(choose(twice, 9)) == 1


@pytest.mark.slow
def test_the_file_is_what_the_objective_reads_and_the_same_each_time(tmp_path: Path, capsys):
    paths = [tmp_path / "a" / "chat.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        main(["--output", str(path), "--conversations", "300"])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = paths[0].read_text().splitlines()
    assert len(lines) == 300
    exchanges = [e for line in lines for e in read_line(line.encode(), "messages", "line")]
    assert len({e.answer for e in exchanges}) == len(exchanges) > 300
    assert exchanges[0].prompt.startswith(f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n<s>[INST] What ")
    assert f"300 conversations, {len(exchanges)} answers" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys):
    error = usage_error(main, ["--output", str(tmp_path / "x"), "--conversations", "0"], capsys)
    assert "--conversations must be >= 1 (got 0)" in error
    assert list(tmp_path.iterdir()) == []
