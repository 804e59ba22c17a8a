"""Token ids to and from text: sentinels that can be typed and read, and streaming decoding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.text import check_unicode
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import sentinel_ids

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_REPLACEMENT = "\ufffd"
_LONGEST = 4
"""Bytes of the longest character in UTF-8, hence the most tokens that one character can span."""


class TextTokenizer:
    """A tokenizer that reads and prints sentinels of span corruption as `<extra_id_0>`, ...

    Most tokenizers decode sentinels to nothing and cannot encode them.

    Args:
        base: the tokenizer of all other text.
        data: its configuration, which may add sentinels (`--vocab-extra-ids`).
        start: id that the model's rows start with (`--decoder-start-token-id`).

    Attributes:
        start: that id as a list, empty if rows start with text.
    """

    def __init__(self, base: Tokenizer, data: DataConfig, start: int | None = None) -> None:
        self.base = base
        self.start = [] if start is None else [start]
        self.eod = base.eod
        self.size = base.vocab_size + data.vocab_extra_ids
        """Number of ids; higher ones are padding of the vocabulary."""
        has_sentinels = base.extra_ids or data.vocab_extra_ids
        self.sentinels = sentinel_ids(data, base) if has_sentinels else range(0)
        self._before = self._visible_ids()

    def _visible_ids(self) -> list[int]:
        """Ids of some visible text, see `_decode_inner`."""
        try:
            return self.base.tokenize("a")
        except UsageError:  # a tokenizer of numbers
            return [0]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end of document.

        Raises:
            UsageError: a sentinel that the model does not have, an id beyond its vocabulary, or a
                text that UTF-8 cannot encode.
        """
        check_unicode(text, "text of a prompt")
        ids: list[int] = []
        for number, part in enumerate(_SENTINEL.split(text) if self.sentinels else [text]):
            if number % 2 == 0:
                ids += self.base.tokenize(part) if part else []
            elif int(part) < len(self.sentinels):
                ids.append(self.sentinels[int(part)])
            else:
                expected = f"<= <extra_id_{len(self.sentinels) - 1}>"
                raise UsageError("sentinel in a prompt", f"<extra_id_{part}>", expected)
        wrong = [i for i in ids if not 0 <= i < self.size]
        if wrong:
            raise UsageError("token id in a prompt", wrong[0], f"from 0 to {self.size - 1}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` including sentinels; other special ids have no text."""
        parts: list[str] = []
        for is_sentinel, group in groupby(ids, self.sentinels.__contains__):
            run = list(group)
            if is_sentinel:
                parts += [f"<extra_id_{self.sentinels.index(i)}>" for i in run]
            else:
                parts.append(self._decode_inner(run) if parts else self._decode_plain(run))
        return "".join(parts)

    def piece(self, token: int) -> str:
        """One token for a table: its text in quotes, or `<ID>` if it has no text by itself."""
        text = self.decode([token]) if token in self.sentinels else self._decode_inner([token])
        return f"<{token}>" if not text or _REPLACEMENT in text else repr(text)

    def _decode_plain(self, ids: list[int]) -> str:
        return self.base.detokenize(ids)

    def _decode_inner(self, ids: list[int]) -> str:
        """The text of ids that are not at the start of a text.

        Tokenizers strip the leading space of the first token: " the" decodes to "the" alone, but
        to " the" after another token. So ids are decoded after a visible prefix, which is cut off.
        """
        return self._decode_plain(self._before + ids)[len(self._decode_plain(self._before)) :]


class DecodeStream:
    """Decodes ids incrementally; the parts concatenate to the text of all ids.

    A character that spans several tokens is returned when it is complete. Bytes that are incomplete
    at the end, or invalid UTF-8, become U+FFFD as in `TextTokenizer.decode`.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        """The last ids, from a place where the text can be cut; decoding all would be quadratic."""
        self._returned = len(tokenizer.decode(self._ids))
        """Characters of the text of `_ids` that have been returned."""
        self._cut_at = len(self._ids)
        """Number of ids that the next cut drops."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # An incomplete character decodes to one to three U+FFFD at the end of the text, which later
        # tokens may turn into another character; U+FFFD further back is final.
        end = len(text)
        while end > max(self._returned, len(text) - _LONGEST + 1) and text[end - 1] == _REPLACEMENT:
            end -= 1
        part = text[self._returned : end]
        self._returned = max(self._returned, end)
        if end == len(text) and part.strip():
            self._cut()
        return part

    def finish(self) -> str:
        """The remaining text, which was held back as incomplete."""
        part = self._tokenizer.decode(self._ids)[self._returned :]
        self._returned += len(part)
        return part

    def _cut(self) -> None:
        """Drop all ids but those of the last part, which suffice as context of later ones."""
        self._ids = self._ids[self._cut_at :]
        self._returned = len(self._tokenizer.decode(self._ids))
        self._cut_at = len(self._ids)
