"""The interface of all tokenizers, and the special ids that OpenMoE uses.

The special ids are umT5's: pad = 0, eos = 1, unk = 2, and no beginning-of-sequence token. A
document ends with `eod`, which is eos.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from megatron_moe.errors import UsageError

PAD, EOS, UNK = 0, 1, 2
"""umT5's special ids."""
NO_ID = -1
"""The id of a special token that a tokenizer does not have."""


class Tokenizer(ABC):
    """Converts between text and ids in `0 .. vocab_size - 1`."""

    vocab_size: int
    """Number of ids of the tokenizer itself, before extra ids and padding."""
    eod: int
    """End-of-document id."""
    pad: int
    """Fills the rest of a sample; its loss is masked. `NO_ID` if there is none."""
    unk: int
    """Replaces text that has no id. `NO_ID` if there is none."""
    bos: int = NO_ID
    """Begins a sequence in models of other projects; never added to a text here."""
    extra_ids: int = 0
    """Number of the tokenizer's own ids, counted from the last, that are T5 sentinels."""
    files: Mapping[str, bytes] = MappingProxyType({})
    """Contents of its files by the names under which a checkpoint keeps them, see `files.py`."""
    identity: str
    """Equal for two tokenizers if and only if they map text to the same ids, see also
    `vocabulary_of`."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of ``text``, without `eod`."""

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """Return the ids of UTF-8 text as an array, without `eod`; faster than `tokenize`.

        Raises:
            UsageError: an id does not fit into 32 bits.
        """
        try:
            return np.array(self.tokenize(text.decode()), dtype=np.int32)
        except OverflowError as error:
            raise UsageError("token id", str(error), "an id of at most 31 bits") from None

    def enable_word_cache(self) -> str:
        """Let `encode` cache the ids of words, if this changes no id.

        Returns:
            The reason why the cache stays off; empty if it is on.
        """
        return f"{type(self).__name__} has none"

    def enable_fast_encode(self) -> None:  # noqa: B027 (most tokenizers have no faster path)
        """Prepare for many calls of `encode`, which then takes less time for the same ids."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``. Special ids have no text; padded ids read as unk."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron-Core's datasets write into their descriptions."""
        return {"class": type(self).__name__, "identity": self.identity}


SPECIAL_IN_TEXT = "+special"
"""Ends the identity of a tokenizer that reads special tokens in text."""


def vocabulary_of(identity: str) -> str:
    """The identity of a tokenizer without whether it reads special tokens in text.

    Ids mean the same with and without: data and checkpoints of both go together.
    """
    return identity.removesuffix(SPECIAL_IN_TEXT)


def count_sentinels(piece_of: Callable[[int], str | None], size: int) -> int:
    """Count the T5 sentinels at the end of a vocabulary of ``size`` ids.

    Sentinels descend: `<extra_id_0>` has the highest id, `<extra_id_1>` the one below, so a
    vocabulary that ends in `..., <extra_id_1>, <extra_id_0>` has two.
    """
    count = 0
    while count < size and piece_of(size - 1 - count) == f"<extra_id_{count}>":
        count += 1
    return count
