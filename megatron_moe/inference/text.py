"""Text for people: sentinels that can be written and read, and text that arrives token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import sentinel_ids

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_REPLACEMENT = "\ufffd"
_LONGEST = 4
"""Bytes of the longest character in UTF-8: so many tokens at most are one character's."""


class Text:
    """A tokenizer whose sentinels of span corruption are `<extra_id_0>`, `<extra_id_1>`, ...

    Most tokenizers print nothing for them, and have no way to write them into a prompt.

    Args:
        tokenizer: makes all other ids.
        data: its configuration, which may add sentinels (`--vocab-extra-ids`).
    """

    def __init__(self, tokenizer: Tokenizer, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.eod = tokenizer.eod
        self.size = tokenizer.vocab_size + data.vocab_extra_ids
        """Ids that mean something; those of the padded vocabulary are above."""
        has_sentinels = tokenizer.extra_ids or data.vocab_extra_ids
        self.sentinels = sentinel_ids(data, tokenizer) if has_sentinels else range(0)
        self._before = self._visible()

    def _visible(self) -> list[int]:
        """A token with a text: tokenizers take the first blank away only if nothing is before."""
        try:
            return self.tokenizer.tokenize("a")
        except UsageError:  # a tokenizer of numbers
            return [0]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of document.

        Raises:
            UsageError: a sentinel that the model does not have, or a number beyond its vocabulary.
        """
        ids: list[int] = []
        for number, part in enumerate(_SENTINEL.split(text) if self.sentinels else [text]):
            if number % 2 == 0:
                ids += self.tokenizer.tokenize(part) if part else []
            elif int(part) < len(self.sentinels):
                ids.append(self.sentinels[int(part)])
            else:
                expected = f"a sentinel up to <extra_id_{len(self.sentinels) - 1}>"
                raise UsageError("prompt", f"<extra_id_{part}>", expected)
        wrong = [i for i in ids if not 0 <= i < self.size]
        if wrong:
            raise UsageError("token id in a prompt", wrong[0], f"ids from 0 to {self.size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, sentinels included; other special ids have none."""
        parts: list[str] = []
        for is_sentinel, group in groupby(ids, self.sentinels.__contains__):
            run = list(group)
            if is_sentinel:
                parts += [f"<extra_id_{self.sentinels.index(i)}>" for i in run]
            else:
                parts.append(self._inner(run) if parts else self._plain(run))
        return "".join(parts)

    def piece(self, token: int) -> str:
        """One token for a table, in quotes, or `<ID>` if it is no text by itself."""
        text = self.decode([token]) if token in self.sentinels else self._inner([token])
        return f"<{token}>" if not text or _REPLACEMENT in text else repr(text)

    def _plain(self, ids: list[int]) -> str:
        return self.tokenizer.detokenize(ids)

    def _inner(self, ids: list[int]) -> str:
        """The text of ids that do not begin a text."""
        return self._plain(self._before + ids)[len(self._plain(self._before)) :]


class TextStream:
    """Turns ids into text as they come; the parts together are the text of all ids.

    A character whose bytes are several tokens is given when it is complete. What is incomplete at
    the end, or no UTF-8 at all, is given as U+FFFD, as `Text.decode` does.
    """

    def __init__(self, text: Text, prompt: Sequence[int] = ()) -> None:
        self._text = text
        self._ids = list(prompt)
        """Not all: from a place where a text can be cut."""
        self._given = len(text.decode(self._ids))
        self._fresh = len(self._ids)

    def push(self, token: int) -> str:
        """What can be said now that ``token`` has come; often a word, sometimes nothing."""
        self._ids.append(token)
        text = self._text.decode(self._ids)
        # An incomplete character reads as one to three U+FFFD, and may become something else yet.
        sure = len(text)
        while sure > max(self._given, len(text) - _LONGEST + 1) and text[sure - 1] == _REPLACEMENT:
            sure -= 1
        part = text[self._given : sure]
        self._given = max(self._given, sure)
        if sure == len(text) and part.strip():
            self._cut()
        return part

    def finish(self) -> str:
        """What was held back."""
        part = self._text.decode(self._ids)[self._given :]
        self._given += len(part)
        return part

    def _cut(self) -> None:
        """Drop ids before the last part, which is enough to read what follows."""
        self._ids = self._ids[self._fresh :]
        self._given, self._fresh = len(self._text.decode(self._ids)), len(self._ids)
