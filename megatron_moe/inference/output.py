"""Print continuations: as text while it is generated, or as one JSON object per finished text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from megatron_moe.console import for_stream
from megatron_moe.inference.generation import GeneratedToken
from megatron_moe.inference.routing_log import RoutingLog, routing_json, routing_table
from megatron_moe.inference.text import DecodeStream, TextTokenizer


@dataclass(frozen=True, kw_only=True)
class OutputStyle:
    """How continuations are printed."""

    as_json: bool = False
    echo: bool = True
    """Print the prompt before its continuation; JSON has a field for it in any case. Without it,
    the continuation is decoded as a text of its own, without a leading space."""
    numbered: bool = False
    """Print the number of the prompt before each text."""
    stream: bool = True
    """Print text while it is generated rather than when it is finished."""


@dataclass
class _Continuation:
    """State of one continuation."""

    stream: DecodeStream
    pending: str
    """Text that is not printed yet."""
    ids: list[int]
    text: str = ""
    finish_reason: str = ""


class ContinuationPrinter:
    """Prints the continuations of one batch in the order of its prompts.

    The first unfinished one is printed as it is generated; later ones are held back until then.

    Args:
        prompts: texts of the prompts.
        prompt_ids: token ids of the prompts.
        tokenizer: tokenizer of the model.
        style: how to print.
        first: number of the first prompt, from 0.
        log: experts of the tokens, if they are to be printed.
        to: stream to print to, by default standard output.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        tokenizer: TextTokenizer,
        style: OutputStyle,
        first: int = 0,
        log: RoutingLog | None = None,
        to: TextIO | None = None,
    ) -> None:
        self.prompts, self.prompt_ids = prompts, prompt_ids
        self.tokenizer, self.style, self.log = tokenizer, style, log
        self.to = to or sys.stdout
        self.first, self.current = first, 0
        self.continuations = [self._begin(number, ids) for number, ids in enumerate(prompt_ids)]

    def _begin(self, number: int, ids: Sequence[int]) -> _Continuation:
        head = f"--- prompt {self.first + number + 1}\n" if self.style.numbered else ""
        if self.style.echo:
            head += self.tokenizer.decode(ids)
        return _Continuation(DecodeStream(self.tokenizer, ids if self.style.echo else ()), head, [])

    def print(self, tokens: Iterable[GeneratedToken]) -> None:
        """Print all tokens, to the end of all texts."""
        self._flush()
        for generated in tokens:
            continuation = self.continuations[generated.text]
            if generated.token is not None:
                continuation.ids.append(generated.token)
                self._add(continuation, continuation.stream.push(generated.token))
            if generated.finish_reason is not None:
                self._add(continuation, continuation.stream.finish())
                continuation.finish_reason = generated.finish_reason
            self._flush()

    def _add(self, continuation: _Continuation, part: str) -> None:
        continuation.text += part
        continuation.pending += part

    def _flush(self) -> None:
        """Print what is next in prompt order."""
        while self.current < len(self.continuations):
            continuation = self.continuations[self.current]
            if self.style.as_json:
                if not continuation.finish_reason:
                    return
                self.to.write(json.dumps(self._object(self.current), ensure_ascii=False) + "\n")
            else:
                if self.style.stream or continuation.finish_reason:
                    self.to.write(for_stream(continuation.pending, self.to))
                    continuation.pending = ""
                if continuation.finish_reason:
                    self.to.write("\n" + for_stream(self._table(self.current), self.to))
            self.to.flush()
            if not continuation.finish_reason:
                return
            self.current += 1

    def _table(self, number: int) -> str:
        if self.log is None:
            return ""
        ids = [*self.prompt_ids[number], *self.continuations[number].ids]
        return routing_table(self.log.layers(number), ids, self.tokenizer) + "\n"

    def _object(self, number: int) -> dict[str, Any]:
        continuation, ids = self.continuations[number], list(self.prompt_ids[number])
        found: dict[str, Any] = {
            "prompt": self.prompts[number],
            "text": continuation.text,
            "finish": continuation.finish_reason,
            "prompt_ids": ids,
            "ids": continuation.ids,
        }
        if self.log is not None:
            found["tokens"] = [self.tokenizer.piece(token) for token in (*ids, *continuation.ids)]
            found["routing"] = routing_json(self.log.layers(number))
        return found
