"""Prints continuations: as text while it comes, or as a JSON object for each when it is whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megatron_moe.inference.generation import Drawn
from megatron_moe.inference.routing_log import RoutingLog, routing_json, routing_table
from megatron_moe.inference.text import Text, TextStream


@dataclass(frozen=True, kw_only=True)
class Style:
    """What is printed."""

    as_json: bool = False
    echo: bool = True
    """Begin with the prompt, which the text continues; in JSON the prompt is a field in any case.
    Without, an answer is a text of its own, whose first word has no blank before it."""
    numbered: bool = False
    """Say before each text which prompt it is of."""
    stream: bool = True
    """Print text while it comes, rather than when it is whole."""


@dataclass
class _Answer:
    """What is known of one continuation."""

    stream: TextStream
    waiting: str
    ids: list[int]
    text: str = ""
    finish: str = ""


class Output:
    """Prints the continuations of one batch in the order of its prompts.

    The first that is not finished is printed as it comes; those after it wait.

    Args:
        prompts: texts, and their ids.
        prompt_ids: of the same prompts.
        text: the checkpoint's.
        style: what to print.
        first: number of the first prompt, from 0.
        log: which experts the tokens took, if that is to be printed.
        to: where; standard output unless given.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        text: Text,
        style: Style,
        first: int = 0,
        log: RoutingLog | None = None,
        to: TextIO | None = None,
    ) -> None:
        self.prompts, self.prompt_ids = prompts, prompt_ids
        self.text, self.style, self.log, self.to = text, style, log, to or sys.stdout
        self.first, self.current = first, 0
        self.answers = [self._begin(number, ids) for number, ids in enumerate(prompt_ids)]

    def _begin(self, number: int, ids: Sequence[int]) -> _Answer:
        head = f"--- prompt {self.first + number + 1}\n" if self.style.numbered else ""
        if self.style.echo:
            head += self.text.decode(ids)
        return _Answer(TextStream(self.text, ids if self.style.echo else ()), head, [])

    def print(self, drawn: Iterable[Drawn]) -> None:
        """Print everything that is drawn, to the end of all texts."""
        self._flush()
        for one in drawn:
            answer = self.answers[one.text]
            if one.token is not None:
                answer.ids.append(one.token)
                self._say(answer, answer.stream.push(one.token))
            if one.finish is not None:
                self._say(answer, answer.stream.finish())
                answer.finish = one.finish
            self._flush()

    def _say(self, answer: _Answer, part: str) -> None:
        answer.text += part
        answer.waiting += part

    def _flush(self) -> None:
        """Print what may be printed now."""
        while self.current < len(self.answers):
            answer = self.answers[self.current]
            if self.style.as_json:
                if not answer.finish:
                    return
                self.to.write(json.dumps(self._object(self.current), ensure_ascii=False) + "\n")
            else:
                if self.style.stream or answer.finish:
                    self.to.write(answer.waiting)
                    answer.waiting = ""
                if answer.finish:
                    self.to.write("\n" + self._table(self.current))
            self.to.flush()
            if not answer.finish:
                return
            self.current += 1

    def _table(self, number: int) -> str:
        if self.log is None:
            return ""
        ids = [*self.prompt_ids[number], *self.answers[number].ids]
        return routing_table(self.log.layers(number), ids, self.text) + "\n"

    def _object(self, number: int) -> dict[str, Any]:
        answer, ids = self.answers[number], list(self.prompt_ids[number])
        found: dict[str, Any] = {
            "prompt": self.prompts[number],
            "text": answer.text,
            "finish": answer.finish,
            "prompt_ids": ids,
            "ids": answer.ids,
        }
        if self.log is not None:
            found["tokens"] = [self.text.piece(token) for token in (*ids, *answer.ids)]
            found["routing"] = routing_json(self.log.layers(number))
        return found
