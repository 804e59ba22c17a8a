"""Caches the ids of words, for models in which the segmentation of a word depends on it alone.

This holds for byte-pair models whose pieces never cross a word boundary: a merge joins two
neighbours into a piece, so nothing is merged across a position that no piece spans. It does not
hold for unigram models, even if their pieces respect words: SentencePiece adds up the scores of the
best path in float32 from the start of the text, so the preceding text decides the rounding, and the
rounding decides ties ("--------" as 3 + 5 or 5 + 3) and near ties. In the demo corpus a third of
the documents would get other ids word by word. Unigram models are encoded without a cache.

Where a text may be cut is read from the pieces: bytes fall into six classes, and a cut between two
classes is allowed if no piece contains these classes next to each other. Example: pieces `_the`,
`ab`, `7` and `('` (with _ for the space) never put a digit next to a letter, so " the7('" is cut
into " the", "7" and "('".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_SPACE_SIGN = "\u2581".encode()
"""SentencePiece's replacement for a space."""
CLASSES: dict[str, bytes] = {
    "space": rb" ",
    "newline": rb"\n",
    "letter": rb"A-Za-z",
    "digit": rb"0-9",
    "other": rb"\x00-\x09\x0b-\x1f!-/:-@\[-`{-\x7f",
    "high": rb"\x80-\xff",
}
"""Byte ranges in regular expression syntax. `high`: every byte of a character beyond ASCII."""
LONGEST = 64
"""Bytes of the longest word that is cached."""
_WORDS = 300_000
"""Entries at which the cache is cleared: it stays below 70 MB."""
_BPE = 2
"""`TrainerSpec.ModelType.BPE`."""
_TEXT_TYPES = {1, 4, 5}
"""`SentencePiece.Type` of pieces that stand for text: normal, user defined, unused."""

Encode = Callable[[bytes], npt.NDArray[np.int32]]


def word_pattern(proto: Any) -> bytes | str:
    """Return a regular expression that splits text where no piece crosses, or why there is none.

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
    """Return the pairs of classes that are neighbours inside a piece."""
    class_of = {
        bytes([value]): name
        for name, values in CLASSES.items()
        for value in range(256)
        if re.fullmatch(b"[" + values + b"]", bytes([value]))
    }
    pairs = {("high", "high")}  # the bytes of one character are never separated
    for piece in pieces:
        content = piece.encode().replace(_SPACE_SIGN, b" ")
        pairs |= set(pairwise(class_of[content[i : i + 1]] for i in range(len(content))))
    return pairs


def _pattern(pairs: set[tuple[str, str]]) -> bytes:
    """Build the expression: one alternative per group of classes that pieces join.

    Example: if pieces join letters with letters and with a space before them, and digits with
    nothing, the alternatives are ` ?(?:[A-Za-z]+)`, `[0-9]`, those of the other classes, and ` `.
    """
    # Merge the classes of each pair, so that groups end up as the connected classes.
    groups = [{name} for name in CLASSES if name != "space"]
    for left, right in sorted(pairs):
        if left != "space":
            merged = set().union(*(group for group in groups if {left, right} & group))
            groups = [group for group in groups if not merged & group] + [merged]

    def alternative(group: set[str]) -> bytes:
        repeats = any((a, b) in pairs for a in group for b in group)
        ranges = b"".join(CLASSES[name] for name in sorted(group))
        return b"[" + ranges + (b"]+" if repeats else b"]")

    # Pieces have spaces at their start only (`word_pattern` rejects others). Groups that follow a
    # space in some piece take the spaces before them; all other groups begin a word themselves.
    led = [group for group in groups if any(("space", name) in pairs for name in group)]
    rest = [alternative(group) for group in groups if group not in led]
    joined = ("space", "space") in pairs
    if led:
        spaces = b" *" if joined else b" ?"
        rest.insert(0, spaces + b"(?:" + b"|".join(map(alternative, led)) + b")")
    return b"|".join([*rest, b" +" if joined else b" "])


class WordCache(dict[bytes, bytes]):
    """Encodes text word by word; maps each word to its packed int32 ids.

    A dict whose `__missing__` encodes new words, so that a hit costs one C-level lookup. The cache
    is cleared when it is full, so that it adapts to a change of domain.

    Args:
        encode: returns the ids of a text, with no dummy prefix.
        pattern: from `word_pattern`.
    """

    def __init__(self, encode: Encode, pattern: bytes) -> None:
        super().__init__()
        self._encode = encode
        self._find = re.compile(pattern).findall

    def ids(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the ids of UTF-8 text."""
        if _SPACE_SIGN in text:  # a space to the model, but not to the pattern
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
