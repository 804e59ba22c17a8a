"""What the model continues: prompts from a file, and conversations in OpenMoE's chat template.

The ids of a conversation are those of tuning with `--objective sft`: each question and each answer
is tokenized separately, and an end of document follows each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_moe.data.objectives.chat import SYSTEM, USER, in_template
from megatron_moe.errors import UsageError
from megatron_moe.files import read_small
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.text import (
    check_unicode,
    decode,
    full_lines,
    json_of_line,
    keys_of,
    other_encoding,
    read_standard_input,
    shown,
)

RESET = "/reset"
"""Input that starts a new conversation."""
ANSWER_BEGIN, ANSWER_END = "\ufdd0", "\ufdd1"
"""Delimiters of answers in a conversation that is passed as one text. They are Unicode
noncharacters, reserved for internal use of programs, so they do not occur in texts."""


def read_prompts(path: str) -> list[str]:
    """Read a prompts file: one prompt per line; in a `.jsonl` file, field `prompt` of each object.

    Args:
        path: the file; `-` is standard input, one prompt per line. Empty lines are skipped.

    Raises:
        UsageError: the file is not readable or has no prompts, or a line is not such an object.
    """
    try:
        content = read_standard_input() if path == "-" else read_small(path)
    except OSError as error:
        raise UsageError("--prompts-file", path, "a readable text file", str(error)) from None
    if name := other_encoding(content):
        fix = f"iconv -f {name} -t UTF-8 converts it"
        raise UsageError(f"encoding of {path}", name, "UTF-8", fix)
    lines = [(f"line {number} of {path}", line) for number, line in full_lines(content)]
    if not lines:
        raise UsageError("--prompts-file", path, "a file with prompts", "it is empty")
    read = _prompt_of if path.endswith(".jsonl") else _plain_prompt
    return [read(line, where) for where, line in lines]


def _plain_prompt(line: bytes, where: str) -> str:
    return decode(line, where)


def _prompt_of(line: bytes, where: str) -> str:
    record = json_of_line(line, where, 'a JSON object with a string "prompt"')
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        found = shown(prompt) if isinstance(record, dict) else shown(record)
        expected = 'a JSON object with a string "prompt"'
        raise UsageError(where, found, expected, keys_of(record))
    return check_unicode(prompt, f"prompt in {where}")


def encode_prompts(
    prompts: Sequence[str], tokenizer: TextTokenizer, *, append_eod: bool
) -> list[list[int]]:
    """Ids of each prompt, at least one: an empty prompt is an end of document.

    A document follows the end of another, so the model continues an end of document with a new one.
    If rows of the model start with a token (`--decoder-start-token-id`), prompts do, too.

    Args:
        prompts: texts.
        tokenizer: tokenizer of the model.
        append_eod: append an end of document to each, as to the inputs of UL2.
    """
    end = [tokenizer.eod] if append_eod else []
    encoded = [[*tokenizer.start, *tokenizer.encode(prompt), *end] for prompt in prompts]
    return [ids or [tokenizer.eod] for ids in encoded]


class Conversation:
    """The turns of a conversation so far, as token ids.

    Args:
        tokenizer: tokenizer of the model.
        system: system prompt before the first question; empty for none.
    """

    def __init__(self, tokenizer: TextTokenizer, system: str = "") -> None:
        self._tokenizer = tokenizer
        self._system = SYSTEM.format(system) if system else ""
        self._ids: list[int] = []

    def ask(self, question: str) -> list[int]:
        """All ids up to the start of the answer. Does not change the conversation."""
        system = "" if self._ids else self._system
        before = self._ids or self._tokenizer.start
        return [*before, *self._tokenizer.encode(system + USER.format(question))]

    def add_answer(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Append an answer to ``prompt``, the ids that `ask` returned."""
        self._ids = [*prompt, *answer, self._tokenizer.eod]


def conversation_text(turns: Sequence[Mapping[str, str]], *, to_answer: bool) -> str:
    """A conversation as one text, to be encoded by `encode_conversation`.

    A harness passes prompts as strings, and tokenizing such a string as a whole would merge tokens
    across turns. `ANSWER_BEGIN` and `ANSWER_END` mark where it has to be split.

    Args:
        turns: each with `role` and `content`, as in tuning data.
        to_answer: the last turn is a question to answer; otherwise an answer to continue.

    Raises:
        UsageError: roles are not in the order of tuning data, or a content has a delimiter.
    """
    where = "a task's conversation"
    for number, turn in enumerate(turns, 1):
        if ANSWER_BEGIN in turn["content"] or ANSWER_END in turn["content"]:
            found, expected = turn["content"][:40], "without the noncharacters U+FDD0 and U+FDD1"
            raise UsageError(f"content of turn {number} in {where}", found, expected)
    questions, answers = in_template([(turn["role"], turn["content"]) for turn in turns], where)
    if len(questions) != len(answers) + to_answer:
        found = turns[-1]["role"] if turns else "missing"
        expected = "user" if to_answer else "assistant"
        raise UsageError(f"role of the last turn in {where}", found, expected)
    answers = [*answers, ""] if to_answer else answers
    pairs = zip(questions, answers, strict=True)
    return ANSWER_END.join(question + ANSWER_BEGIN + answer for question, answer in pairs)


def encode_conversation(tokenizer: TextTokenizer, conversation: str) -> list[int]:
    """Ids of a text from `conversation_text`, or of any other text, which has no delimiters.

    Questions and answers are tokenized separately, and an end of document follows each answer that
    is complete. A continuation appended to the text becomes part of its last answer.
    """
    ids: list[int] = []
    for number, exchange in enumerate(conversation.split(ANSWER_END)):
        ids += [tokenizer.eod] if number else []
        for part in exchange.split(ANSWER_BEGIN):
            ids += tokenizer.encode(part)
    return ids


def unfinished_answer(conversation: str) -> str | None:
    """The text of the last answer so far; `None` if the text is not a conversation."""
    _, begins, answer = conversation.rpartition(ANSWER_BEGIN)
    return answer if begins else None
