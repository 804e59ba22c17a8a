"""SentencePiece models, and a faster equivalent of unigram models.

SentencePiece replaces every space of a text by U+2581, which takes three bytes in UTF-8, and then
searches for pieces byte by byte. In source code a third of the bytes are spaces after that.
`with_plain_spaces` makes a copy of a unigram model in which pieces contain plain spaces and the
spaces of the text stay as they are. Candidate pieces are the same, with the same scores, in the
same order, so sums are rounded alike and ties are broken alike: no id changes, and encoding takes a
fifth less time. Byte-pair models gain nothing; they have a word cache instead (`word_cache`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_moe.errors import UsageError
from megatron_moe.files import describe_start
from megatron_moe.tokenizer.base import Tokenizer, count_sentinels
from megatron_moe.tokenizer.files import TYPES, read_model
from megatron_moe.tokenizer.word_cache import WordCache, word_pattern

SPACE_SIGN = "\u2581"
"""SentencePiece's replacement for a space. To the copy with plain spaces it is an ordinary
character, so texts that contain it are encoded with the original model."""
_SPACE_SIGN_UTF8 = SPACE_SIGN.encode()
_UNIGRAM = 1
"""`TrainerSpec.ModelType.UNIGRAM`."""
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
"""`SentencePiece.Type` of the pieces that are searched for in texts."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file, or the folder that holds it; special ids are read from it.

    Raises:
        UsageError: the file cannot be read, is no model, or has no end-of-sequence piece.
    """

    def __init__(self, path: str) -> None:
        content = read_model(path, _file_of(path), "a SentencePiece model")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            reason = _reason(content, error)
            raise UsageError("--tokenizer-model", path, "a SentencePiece model", reason) from None
        self.vocab_size = self._model.get_piece_size()
        self._check_pieces(path)
        self.eod, self.pad, self.unk = (
            self._model.eos_id(),
            self._model.pad_id(),
            self._model.unk_id(),
        )
        self.bos = self._model.bos_id()
        if self.eod < 0:
            raise UsageError("--tokenizer-model", path, "a model with an end-of-sequence piece")
        self.extra_ids = count_sentinels(self._model.id_to_piece, self.vocab_size)
        self.identity = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.model": content}
        self._word_cache: WordCache | None = None
        self._dummy_prefix = b""
        self._plain: sentencepiece.SentencePieceProcessor | None = None

    def _check_pieces(self, path: str) -> None:
        """Reject pieces that are not UTF-8, which would be an error when one is first decoded."""
        try:
            self._model.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError as error:
            expected, reason = "a model whose pieces are UTF-8", f"{error.object!r} is not"
            raise UsageError("--tokenizer-model", path, expected, reason) from None

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the ids of UTF-8 text as an array; see `Tokenizer.encode`."""
        if self._word_cache is not None:
            return self._word_cache.ids(self._dummy_prefix + text if text else text)
        model = self._model if self._plain is None or _SPACE_SIGN_UTF8 in text else self._plain
        ids: npt.NDArray[np.int32] = model.encode(text, return_type="numpy")
        return ids

    def enable_fast_encode(self) -> None:
        """Encode with plain spaces where this changes no id."""
        content = with_plain_spaces(self._proto())
        if not isinstance(content, str):
            self._plain = sentencepiece.SentencePieceProcessor(model_proto=content)

    def enable_word_cache(self) -> str:
        """Encode word by word where this changes no id; see `Tokenizer.enable_word_cache`."""
        proto = self._proto()
        pattern = word_pattern(proto)
        if isinstance(pattern, str):
            return pattern
        # The model would put its dummy space before every word; `encode` puts one before the text.
        self._dummy_prefix = b" " if proto.normalizer_spec.add_dummy_prefix else b""
        proto.normalizer_spec.add_dummy_prefix = False
        bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._word_cache = WordCache(lambda word: bare.encode(word, return_type="numpy"), pattern)
        return ""

    def _proto(self) -> Any:
        """Parse the model file."""
        # Imported here because it brings protobuf, which only the two `enable_` methods need.
        from sentencepiece import sentencepiece_model_pb2 as messages

        content = self._model.serialized_model_proto()
        return messages.ModelProto.FromString(content)  # type: ignore[attr-defined]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        text: str = self._model.decode([i if i < self.vocab_size else self.unk for i in ids])
        return text


def _file_of(path: str) -> Path:
    """The model file of a path, which may be that of a folder."""
    names = [name for name, kind in TYPES.items() if kind == "SentencePieceTokenizer"]
    inside = (Path(path) / name for name in names)
    return next((file for file in inside if file.is_file()), Path(path))


def _reason(content: bytes, error: Exception) -> str:
    """Why a file is no model."""
    found = describe_start(content)
    if content.lstrip()[:1] == b"{":
        return "it is JSON; --tokenizer-type HuggingFaceTokenizer reads a tokenizer.json"
    if "tiktoken" in found:
        return f"{found}; give the model's tokenizer.json, with HuggingFaceTokenizer"
    return f"{found} ({' '.join(str(error).split())})"


def with_plain_spaces(proto: Any) -> bytes | str:
    """Return the content of the model file with plain spaces, or the reason why there is none.

    Each reason names a way in which the copy could give other ids than the original.

    Args:
        proto: the parsed model file; it is modified.
    """
    if proto.trainer_spec.model_type != _UNIGRAM:
        return "not a unigram model"
    if not proto.normalizer_spec.escape_whitespaces:
        return "its spaces are plain already"
    if _SPACE_SIGN_UTF8 in proto.normalizer_spec.precompiled_charsmap:
        return f"its normalizer writes {SPACE_SIGN} itself"
    in_texts = [p for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED, _UNUSED)]
    if any(" " in piece.piece for piece in in_texts):
        return "it has pieces with plain spaces already"
    # The scores of user-defined pieces follow from their length in bytes, which would change, and
    # the normalizer searches for them as well.
    if any(SPACE_SIGN in piece.piece for piece in in_texts if piece.type == _USER_DEFINED):
        return "a user-defined piece has a space inside it"
    # Without this piece a space is an unknown character. Byte fallback then writes the three bytes
    # of the sign in the original, and the one byte of a plain space in the copy.
    if not any(piece.piece == SPACE_SIGN for piece in in_texts if piece.type == _NORMAL):
        return "a space alone is no piece of it"
    for piece in in_texts:
        piece.piece = piece.piece.replace(SPACE_SIGN, " ")
    proto.normalizer_spec.escape_whitespaces = False
    content: bytes = proto.SerializeToString()
    return content
