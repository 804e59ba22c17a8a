"""Remembers the ids of words, for models of which segmentation is a function of the word.

That holds for byte-pair models whose pieces never cross a word boundary: a merge joins neighbours
into a piece, so nothing is ever merged across a place that no piece has inside it. It does not hold
for unigram models, although their pieces may be of the same shape: SentencePiece adds up the scores
of the best path from the start of the text in float32, so that the rounding, which the text before
a word decides, settles ties ("--------" as 3 + 5 or 5 + 3) and near ties. Of the demo corpus, a
third of the documents come out differently word by word. Those models are encoded without a cache.

Whether a place may be cut is read from the pieces themselves: bytes fall into six classes, and a
cut between two classes is allowed if no piece has such neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_MARK = "\u2581".encode()
"""SentencePiece's sign for a space."""
CLASSES: dict[str, bytes] = {
    "space": rb" ",
    "newline": rb"\n",
    "letter": rb"A-Za-z",
    "digit": rb"0-9",
    "other": rb"\x00-\x09\x0b-\x1f!-/:-@\[-`{-\x7f",
    "high": rb"\x80-\xff",
}
"""Ranges of bytes, as regular expressions write them. `high`: all of a character beyond ASCII."""
LONGEST = 64
"""Bytes of the longest word that is remembered."""
_WORDS = 300_000
"""Entries, after which the cache starts anew: below 70 MB."""
_BPE = 2
"""`TrainerSpec.ModelType.BPE`."""
_TEXT_TYPES = {1, 4, 5}
"""`SentencePiece.Type` of pieces that stand for text: normal, user defined, unused."""

Encode = Callable[[bytes], npt.NDArray[np.int32]]


def word_pattern(proto: Any) -> bytes | str:
    """A regular expression that cuts text wherever no piece crosses; or why there is none.

    Args:
        proto: the parsed model file.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _BPE:
        return "not a byte-pair model, so the text before a word can change its ids"
    if not trainer.byte_fallback:
        return "no byte fallback, so unknown characters join across words"
    if trainer.treat_whitespace_as_suffix:
        return "spaces end its words"
    changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if changes or not normalizer.escape_whitespaces:
        return "its normalizer changes the text"
    pairs = _neighbours(piece.piece for piece in proto.pieces if piece.type in _TEXT_TYPES)
    crossing = {left for left, right in pairs if right == "space" and left != "space"}
    if crossing:
        return f"it has pieces with a space after a {min(crossing)}"
    return _pattern(pairs)


def _neighbours(pieces: Iterable[str]) -> set[tuple[str, str]]:
    """Pairs of classes that stand side by side inside a piece."""
    kinds = {
        bytes([value]): name
        for name, values in CLASSES.items()
        for value in range(256)
        if re.fullmatch(b"[" + values + b"]", bytes([value]))
    }
    pairs = {("high", "high")}  # the bytes of one character
    for piece in pieces:
        content = piece.encode().replace(_MARK, b" ")
        pairs |= set(pairwise(kinds[content[i : i + 1]] for i in range(len(content))))
    return pairs


def _pattern(pairs: set[tuple[str, str]]) -> bytes:
    groups = [{name} for name in CLASSES if name != "space"]
    for left, right in sorted(pairs):
        if left != "space":
            merged = set().union(*(group for group in groups if {left, right} & group))
            groups = [group for group in groups if not merged & group] + [merged]

    def alternative(group: set[str]) -> bytes:
        repeats = any((a, b) in pairs for a in group for b in group)
        ranges = b"".join(CLASSES[name] for name in sorted(group))
        return b"[" + ranges + (b"]+" if repeats else b"]")

    led = [group for group in groups if any(("space", name) in pairs for name in group)]
    rest = [alternative(group) for group in groups if group not in led]
    joined = ("space", "space") in pairs
    if led:
        spaces = b" *" if joined else b" ?"
        rest.insert(0, spaces + b"(?:" + b"|".join(map(alternative, led)) + b")")
    return b"|".join([*rest, b" +" if joined else b" "])


class WordCache(dict[bytes, bytes]):
    """Packed ids by word; encodes text word by word.

    Starts anew when it is full, so that it follows a change of domain.

    Args:
        encode: the ids of a text, without anything put before it.
        pattern: of `word_pattern`.
    """

    def __init__(self, encode: Encode, pattern: bytes) -> None:
        super().__init__()
        self._encode = encode
        self._find = re.compile(pattern).findall

    def ids(self, text: bytes) -> npt.NDArray[np.int32]:
        """The ids of a text in UTF-8."""
        if _MARK in text:  # to the model a space as well, which the pattern does not know
            return self._encode(text)
        packed = b"".join(map(self.__getitem__, self._find(text)))
        return np.frombuffer(packed, dtype=np.int32)

    def __missing__(self, word: bytes) -> bytes:
        packed = self._encode(word).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= _WORDS:
                self.clear()
            self[word] = packed
        return packed
