"""Text to token ids and back.

The special ids are umT5's, which OpenMoE uses: pad = 0, eos = 1, unk = 2, no beginning-of-sequence
token. A document ends with `eod`, which is eos.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.plain_spaces import MARK, with_plain_spaces
from megatron_moe.tokenizer.word_cache import WordCache, word_pattern

PAD, EOS, UNK = 0, 1, 2
"""umT5's special ids."""
NONE = -1
"""The id of a special token that a tokenizer does not have."""
_MARK = MARK.encode()


class Tokenizer(ABC):
    """Between text and ids `0 .. vocab_size - 1`."""

    vocab_size: int
    """Number of ids of its own, before extra ids and any padding."""
    eod: int
    """Ends a document."""
    pad: int
    """Fills a sample; its loss is masked. -1 if there is none."""
    unk: int
    """Stands for what has no id. -1 if there is none."""
    extra_ids: int = 0
    """How many of its own ids, the last ones, are sentinels of span corruption."""
    identity: str
    """Equal for two tokenizers if and only if they map text to the same ids."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text``, without `eod`."""

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """The ids of a text in UTF-8, without `eod`: `tokenize`, as fast as it goes.

        Raises:
            UsageError: an id is beyond 32 bits.
        """
        try:
            return np.array(self.tokenize(text.decode()), dtype=np.int32)
        except OverflowError as error:
            raise UsageError("token id", str(error), "an id of 31 bits") from None

    def remember_words(self) -> str:
        """Let `encode` remember the ids of words, if that changes no id.

        Returns:
            Why it does not; empty if it does.
        """
        return f"{type(self).__name__} has none"

    def hurry(self) -> None:  # noqa: B027 (most have nothing to do)
        """Prepare for many calls of `encode`, which give the same ids in less time."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``. Special ids have none; ids of the padded vocabulary read as unk."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron-Core's data sets write into their descriptions."""
        return {"class": type(self).__name__, "identity": self.identity}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; the special ids are read from it."""

    def __init__(self, path: str) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UsageError("--tokenizer-model", path, "a readable file", str(error)) from None
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise UsageError("--tokenizer-model", path, "a SentencePiece model") from None
        self.vocab_size = self._model.get_piece_size()
        self.eod, self.pad, self.unk = (
            self._model.eos_id(),
            self._model.pad_id(),
            self._model.unk_id(),
        )
        if self.eod < 0:
            raise UsageError("--tokenizer-model", path, "a model with an end-of-sequence piece")
        self.extra_ids = sentinels_at_the_end(self._model.id_to_piece, self.vocab_size)
        self.identity = hashlib.sha256(content).hexdigest()
        self._words: WordCache | None = None
        self._prefix = b""
        self._plain: sentencepiece.SentencePieceProcessor | None = None

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text``, without `eod`."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """The same as an array, of a text in UTF-8."""
        if self._words is not None:
            return self._words.ids(self._prefix + text if text else text)
        model = self._model if self._plain is None or _MARK in text else self._plain
        ids: npt.NDArray[np.int32] = model.encode(text, return_type="numpy")
        return ids

    def hurry(self) -> None:
        """See `megatron_moe.tokenizer.plain_spaces`."""
        content = with_plain_spaces(self._proto())
        if not isinstance(content, str):
            self._plain = sentencepiece.SentencePieceProcessor(model_proto=content)

    def remember_words(self) -> str:
        """See `Tokenizer.remember_words` and `megatron_moe.tokenizer.word_cache`."""
        proto = self._proto()
        pattern = word_pattern(proto)
        if isinstance(pattern, str):
            return pattern
        self._prefix = b" " if proto.normalizer_spec.add_dummy_prefix else b""
        proto.normalizer_spec.add_dummy_prefix = False
        bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._words = WordCache(lambda word: bare.encode(word, return_type="numpy"), pattern)
        return ""

    def _proto(self) -> Any:
        """The model file, parsed."""
        from sentencepiece import sentencepiece_model_pb2 as messages

        content = self._model.serialized_model_proto()
        return messages.ModelProto.FromString(content)  # type: ignore[attr-defined]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        text: str = self._model.decode([i if i < self.vocab_size else self.unk for i in ids])
        return text


def sentinels_at_the_end(piece_of: Callable[[int], str | None], size: int) -> int:
    """How many of the last ids are T5's sentinels, which descend: `<extra_id_0>` is the last."""
    count = 0
    while count < size and piece_of(size - 1 - count) == f"<extra_id_{count}>":
        count += 1
    return count


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the three special ids, as in ByT5 (arXiv 2105.13626): byte b is b + 3."""

    def __init__(self) -> None:
        self.eod, self.pad, self.unk = EOS, PAD, UNK
        self._first = UNK + 1
        self.vocab_size = self._first + 256
        self.identity = "bytes+3"

    def tokenize(self, text: str) -> list[int]:
        """The ids of ``text``, without `eod`."""
        return [byte + self._first for byte in text.encode("utf-8")]

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """The same as an array, of a text in UTF-8."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32) + self._first

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        values = [i - self._first if i < self.vocab_size else ord("?") for i in ids if i > UNK]
        return bytes(values).decode("utf-8", errors="replace")


class NullTokenizer(Tokenizer):
    """No text: a document is written as its ids, separated by spaces.

    The last of the ``vocab_size`` ids is eod. (Megatron-LM's tokenizer of this name adds eod to the
    number it is given.)
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod, self.pad, self.unk = vocab_size - 1, NONE, NONE
        self.identity = f"null {vocab_size}"

    def tokenize(self, text: str) -> list[int]:
        """The numbers in ``text``."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise UsageError("text for NullTokenizer", text[:40], "integers and spaces") from None

    def detokenize(self, ids: Sequence[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(map(str, ids))


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that the flags ask for.

    Raises:
        UsageError: a flag the tokenizer needs is missing, its file is unreadable, or it has more
            ids than `--vocab-size`.
    """
    if data.tokenizer_type == "SentencePieceTokenizer":
        if data.tokenizer_model is None:
            raise UsageError("--tokenizer-model", None, "a SentencePiece model file")
        tokenizer: Tokenizer = SentencePieceTokenizer(data.tokenizer_model)
    elif data.tokenizer_type == "HuggingFaceTokenizer":
        if data.tokenizer_model is None:
            raise UsageError("--tokenizer-model", None, "a tokenizer.json, or its folder")
        from megatron_moe.tokenizer.huggingface import HuggingFaceTokenizer

        tokenizer = HuggingFaceTokenizer(data.tokenizer_model)
    elif data.tokenizer_type == "ByteTokenizer":
        tokenizer = ByteTokenizer()
    else:
        if data.vocab_size is None or data.vocab_size < 1:
            raise UsageError("--vocab-size", data.vocab_size, "a positive number for NullTokenizer")
        tokenizer = NullTokenizer(data.vocab_size - _extra_ids(data, data.vocab_size))
    unpadded_vocab_size(data, tokenizer)
    return tokenizer


def unpadded_vocab_size(data: DataConfig, tokenizer: Tokenizer) -> int:
    """V before padding: `--vocab-size`, else the tokenizer's. No token id may reach it.

    Raises:
        UsageError: the tokenizer, with `--vocab-extra-ids`, has more ids than `--vocab-size`.
    """
    extra = _extra_ids(data)
    ids = tokenizer.vocab_size + extra
    if data.vocab_size is None:
        return ids
    if data.vocab_size < ids:
        beside = f" and {extra} extra ids" if extra else ""
        expected = f"at least the tokenizer's {tokenizer.vocab_size} ids{beside}"
        raise UsageError("--vocab-size", data.vocab_size, expected)
    return data.vocab_size


def sentinel_ids(data: DataConfig, tokenizer: Tokenizer) -> range:
    """The sentinels of span corruption, first to last: the extra ids from the highest downwards.

    Source: T5 (arXiv 1910.10683) and its code; umT5's 300 extra ids start at 256299.

    Raises:
        UsageError: there are no extra ids.
    """
    own = _extra_ids(data) == 0
    count = tokenizer.extra_ids if own else data.vocab_extra_ids
    if count == 0:
        raise UsageError(
            "--vocab-extra-ids",
            0,
            "a number of sentinels, for span corruption with a tokenizer that has none",
            "give the number that the model is to have, 300 as in umT5",
        )
    last = tokenizer.vocab_size + (0 if own else count) - 1
    return range(last, last - count, -1)


def _extra_ids(data: DataConfig, limit: int | None = None) -> int:
    """`--vocab-extra-ids`, checked."""
    extra = data.vocab_extra_ids
    if extra < 0 or (limit is not None and extra >= limit):
        expected = "0 or more" if limit is None else f"0 to {limit - 1}, below --vocab-size"
        raise UsageError("--vocab-extra-ids", extra, expected)
    return extra


def padded_vocab_size(data: DataConfig, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: V rounded up to a multiple of `--make-vocab-size-divisible-by`.

    Independent of the layout, so that checkpoints are; the tensor-parallel size has to divide it.

    Raises:
        UsageError: the multiple is not positive, or the tokenizer has more ids than `--vocab-size`.
    """
    multiple = data.make_vocab_size_divisible_by
    if multiple < 1:
        raise UsageError("--make-vocab-size-divisible-by", multiple, "a positive number")
    return -(-unpadded_vocab_size(data, tokenizer) // multiple) * multiple
