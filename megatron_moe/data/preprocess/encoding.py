"""What a worker does with a batch of documents: tokenize it, or say which document it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_moe.data.preprocess.reading import Batch
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Documents of one key: ids, tokens of each sequence, sequences of each document."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    text_bytes: int
    """Of the texts in UTF-8."""


@dataclass(frozen=True)
class EncodeError:
    """The arguments of a `UsageError` from a worker, as exceptions do not travel with four."""

    arguments: tuple[str, object, str, str]


Result = list[Encoded] | EncodeError


class _Column:
    """The documents of one key."""

    def __init__(self, tokenizer: Tokenizer, append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._eod = np.array([tokenizer.eod], np.int32) if append_eod else None
        self._parts: list[npt.NDArray[np.int32]] = []
        self._lengths: list[int] = []
        self._sequences: list[int] = []
        self._bytes = 0

    def add(self, texts: Sequence[bytes]) -> None:
        """Texts become sequences of one document; those without ids are left out."""
        before = len(self._lengths)
        for text in texts:
            ids = self._tokenizer.encode(text)
            self._bytes += len(text)
            if len(ids):
                self._parts.append(ids)
                self._lengths.append(len(ids))
        count = len(self._lengths) - before
        if count and self._eod is not None:
            self._parts.append(self._eod)
            self._lengths[-1] += 1
        self._sequences.append(count)

    def pack(self) -> Encoded:
        """All of them."""
        return Encoded(
            ids=np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32),
            lengths=np.array(self._lengths, dtype=np.int64),
            sequences=np.array(self._sequences, dtype=np.int64),
            text_bytes=self._bytes,
        )


def encode(tokenizer: Tokenizer, batch: Batch, keys: Sequence[str], append_eod: bool) -> Result:
    """Tokenize a batch.

    A field is a text, or a list of texts, which become sequences of one document. Sequences without
    ids are left out, as Megatron-LM leaves them out.
    """
    columns = [_Column(tokenizer, append_eod) for _ in keys]
    done = 0
    try:
        for fields in batch.documents(keys):
            for column, texts in zip(columns, fields, strict=True):
                column.add(texts)
            done += 1
    except UsageError as error:
        what = f"{error.what}, {batch.place(done)}"
        return EncodeError((what, error.found, error.expected, error.fix))
    except OSError as error:
        return EncodeError(("--input", batch.path, "a readable file", str(error)))
    return [column.pack() for column in columns]
