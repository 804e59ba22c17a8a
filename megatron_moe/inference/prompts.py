"""Where prompts come from: the command line, a file, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_moe.errors import UsageError
from megatron_moe.inference.text import Text


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: a line each, or of `.jsonl` the text `prompt` of the object on it.

    Args:
        path: `-` for standard input, a line each. Empty lines are left out.

    Raises:
        UsageError: the file cannot be read or holds no prompts, or a line is no such object.
    """
    try:
        content = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("--prompts-file", path, "a readable text file", str(error)) from None
    lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError("--prompts-file", path, "a file with prompts", "it is empty")
    if path.endswith(".jsonl"):
        return [_prompt_of(line, f"line {number} of {path}") for number, line in lines]
    return [line for _, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UsageError(where, line.strip()[:40], 'a JSON object with the text "prompt"')
    return prompt


def encode_prompts(prompts: Sequence[str], text: Text, *, append_eod: bool) -> list[list[int]]:
    """Ids of each prompt, at least one.

    A document begins after the end of another: that is what an empty prompt continues.

    Args:
        prompts: texts.
        text: the checkpoint's.
        append_eod: put an end of document after each, as after the inputs of UL2.
    """
    end = [text.eod] if append_eod else []
    return [text.encode(prompt) + end or [text.eod] for prompt in prompts]
