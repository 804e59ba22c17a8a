"""GPT-2's byte-level BPE from its two files, `vocab.json` and `merges.txt`.

The first maps pieces to ids, the second lists the merges in the order of their priority. Text that
spells `<|endoftext|>` is encoded as text; the id of that name ends documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.files import read_small
from megatron_moe.text import json_value, read_text
from megatron_moe.tokenizer.base import NO_ID, Tokenizer
from megatron_moe.tokenizer.files import MERGES, VOCAB

END = "<|endoftext|>"


class Gpt2BpeTokenizer(Tokenizer):
    """Byte-level BPE; every text has ids, so there is no unk, and GPT-2 has no pad either.

    Args:
        vocab_file: JSON object of pieces and their ids.
        merge_file: two pieces a line; a first line that begins with `#version` is skipped.

    Raises:
        UsageError: `tokenizers` is not installed, a file cannot be read or is another one, or the
            vocabulary has no end of document.
    """

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        try:
            from tokenizers import Tokenizer as Model
            from tokenizers import decoders, models, pre_tokenizers
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install tokenizers"
            expected, found = "used with tokenizers installed", "GPT2BPETokenizer"
            raise UsageError("--tokenizer-type", found, expected, fix) from None
        vocabulary = _vocabulary(vocab_file)
        merges = _merges(merge_file, vocabulary)
        self._model: Any = Model(models.BPE(vocab=vocabulary, merges=merges))
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._model.decoder = decoders.ByteLevel()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod, self.pad, self.unk = vocabulary[END], NO_ID, NO_ID
        content = json.dumps([sorted(vocabulary.items()), merges])
        self.identity = hashlib.sha256(b"gpt2 bpe" + content.encode()).hexdigest()
        self.files = {
            VOCAB: read_small(vocab_file),
            MERGES: read_small(merge_file),
        }

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; `eod` and padded ids have none."""
        own = [i for i in ids if i < self.vocab_size and i != self.eod]
        text: str = self._model.decode(own, skip_special_tokens=False)
        return text


def _vocabulary(path: str) -> dict[str, int]:
    expected = "GPT-2's vocab.json, a JSON object of pieces and ids"
    try:
        values = json_value(read_text(path, "--vocab-file"))
    except ValueError as error:
        raise UsageError("--vocab-file", path, expected, str(error)) from None
    if not isinstance(values, dict) or not all(
        type(i) is int and 0 <= i < 1 << 31 for i in values.values()
    ):
        raise UsageError("--vocab-file", path, expected)
    if END not in values:
        raise UsageError("--vocab-file", path, f"a vocabulary with {END}, which ends documents")
    return values


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _merges(path: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    expected = "GPT-2's merges.txt, two pieces of the vocabulary in each line"
    lines = read_text(path, "--merge-file").split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines[first:], first + 1):
        words = line.rstrip("\r").split(" ")
        if words == [""]:
            continue
        # The library takes any words, and fails with the first text that would use them.
        if len(words) != 2 or any(w not in vocabulary for w in (*words, "".join(words))):
            raise UsageError(f"line {number} of --merge-file {path}", line[:40], expected)
        merges.append((words[0], words[1]))
    return merges
