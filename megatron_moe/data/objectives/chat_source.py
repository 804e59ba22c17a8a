"""A file of conversations, with the interface of an indexed dataset.

The file is tokenized once per content and tokenizer. Ids and loss masks are kept in the index cache
and memory-mapped from there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.data.causal import digest
from megatron_moe.data.indexed.cache import Array, IndexCache
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.objectives.chat import SYSTEM, USER, Exchange, read_line
from megatron_moe.errors import UsageError
from megatron_moe.files import check_data_file, open_regular
from megatron_moe.text import LONGEST_RECORD, bounded_lines, is_blank
from megatron_moe.tokenizer.base import Tokenizer

_BLOCK = 1 << 22
_INT32 = 4
"""Megatron's code of the id type."""


@dataclass(frozen=True)
class Conversations:
    """Tokens of N conversations, one after the other."""

    ids: Array
    loss_mask: Array
    """Whether the loss counts where this id is predicted: answers and their ends."""
    bounds: Array
    """[N + 1]: conversation n has the ids from bounds[n] to bounds[n + 1]."""
    prompts: Array
    """[N], ids of a conversation before its first answer."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class ChatSource(Source):
    """A source in which each conversation is a document of one sequence."""

    conversations: Conversations

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the tokens of each conversation."""
        return np.diff(self.conversations.bounds).astype(np.int32)


def open_conversations(path: str, key: str, tokenizer: Tokenizer, cache: IndexCache) -> ChatSource:
    """Check and tokenize a file, or read it from the cache.

    Args:
        path: JSON Lines; blank lines are skipped.
        key: see `chat.read_line`.
        tokenizer: makes the ids.
        cache: keeps them.

    Raises:
        UsageError: the file cannot be read, a line is not a conversation, or there are none.
    """
    check_data_file(path, "data path")
    content = _hash(path)
    description = {
        "content": content,
        "key": key,
        "template": [SYSTEM, USER],
        "tokenizer": tokenizer.identity,
    }
    arrays = cache.arrays(
        f"chat-{digest(description)}", description, lambda: _tokenize(path, key, tokenizer)
    )
    conversations = Conversations(*arrays)
    return ChatSource(
        prefix=path,
        type_code=_INT32,
        sequences=len(conversations),
        documents=len(conversations),
        tokens=int(conversations.bounds[-1]),
        fingerprint=digest({"content": content, "key": key, "template": [SYSTEM, USER]}),
        conversations=conversations,
    )


def _hash(path: str) -> str:
    found = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK):
                found.update(block)
    except OSError as error:
        expected = "a readable file of conversations, JSON Lines"
        raise UsageError("data path", path, expected, str(error)) from None
    return found.hexdigest()


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    with open_regular(path) as stream:
        for number, line in enumerate(bounded_lines(stream, path, LONGEST_RECORD), 1):
            if not is_blank(line):
                yield number, line


def _tokenize(path: str, key: str, tokenizer: Tokenizer) -> list[Array]:
    ids, loss_mask = array("i"), bytearray()
    bounds, prompts = array("q", [0]), array("i")
    for number, line in _lines(path):
        exchanges = read_line(line, key, f"line {number} of {path}")
        for new, counts in encode_exchanges(exchanges, tokenizer):
            if len(ids) == bounds[-1]:  # the first prompt of a conversation
                prompts.append(len(new))
            ids.extend(new)
            loss_mask.extend(bytes([counts]) * len(new))
        bounds.append(len(ids))
    if not prompts:
        raise UsageError(f"number of conversations in {path}", 0, ">= 1")
    plain: tuple[Any, ...] = (ids, loss_mask, bounds, prompts)
    kinds = (np.int32, np.uint8, np.int64, np.int32)
    return [np.frombuffer(part, dtype=kind) for part, kind in zip(plain, kinds, strict=True)]


def encode_exchanges(
    exchanges: Iterable[Exchange], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of prompts and answers in turn, and whether the loss counts on them.

    Each is tokenized separately, so that a prompt has the same ids as in inference. An answer ends
    with `eod`.
    """
    for exchange in exchanges:
        yield tokenizer.tokenize(exchange.prompt), False
        yield [*tokenizer.tokenize(exchange.answer), tokenizer.eod], True
