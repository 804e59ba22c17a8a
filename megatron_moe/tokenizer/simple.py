"""Tokenizers without a model file: UTF-8 bytes, and text that already consists of ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import EOS, NO_ID, PAD, UNK, Tokenizer


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the three special ids, as in ByT5 (arXiv 2105.13626): byte b is b + 3."""

    def __init__(self) -> None:
        self.eod, self.pad, self.unk = EOS, PAD, UNK
        self._first = UNK + 1
        self.vocab_size = self._first + 256
        self.identity = "bytes+3"

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""
        return [byte + self._first for byte in text.encode("utf-8")]

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the ids of UTF-8 text as an array."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32) + self._first

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        values = [i - self._first if i < self.vocab_size else ord("?") for i in ids if i > UNK]
        return bytes(values).decode("utf-8", errors="replace")


class NullTokenizer(Tokenizer):
    """Text that consists of ids, separated by spaces.

    The last of the ``vocab_size`` ids is eod. (Megatron-LM's tokenizer of this name adds eod to the
    number it is given.)
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod, self.pad, self.unk = vocab_size - 1, NO_ID, NO_ID
        self.identity = f"null {vocab_size}"

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers in ``text``."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            expected = "integers separated by spaces"
            raise UsageError("text for NullTokenizer", text[:40], expected) from None

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the numbers, separated by spaces."""
        return " ".join(map(str, ids))
