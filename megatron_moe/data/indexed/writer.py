"""Writes Megatron's indexed format, byte for byte, as a stream and atomically.

Megatron-Core's own builder keeps every length as a Python object, writes ids unchecked (70000 as
u16 becomes 4464) and leaves a partial file behind when it is killed.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.data.indexed.format import (
    HEADER,
    MAGIC,
    MAX_LENGTH,
    TYPES,
    VERSION,
    paths_of,
    type_code_for,
)
from megatron_moe.errors import UsageError

Ids = npt.NDArray[np.integer] | Sequence[int]
_CHUNK = 1 << 20
"""Entries of the index that are written at a time."""


class IndexedWriter:
    """Context manager that writes `PREFIX.bin` and `PREFIX.idx`.

    The files appear when the context ends without an exception. Until then, and after an exception,
    files that were at the prefix stay unchanged.

    Args:
        prefix: path without suffix.
        vocab_size: all ids must be below it; it also decides the type of the ids.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix, self.vocab_size = prefix, vocab_size
        self.documents = self.sequences = self.tokens = 0
        self._code = type_code_for(vocab_size)
        self._lengths = array("i")
        self._document_ends = array("q", [0])
        bin_path, idx_path = paths_of(prefix)
        self._partial = tuple(f"{path}.partial-{os.getpid()}" for path in (bin_path, idx_path))
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self._partial[0], "wb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise UsageError("output prefix", prefix, "a writable path", str(error)) from None

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            try:
                self._stream.close()  # flushes, which fails on a full disk
            finally:
                for path in self._partial:
                    Path(path).unlink(missing_ok=True)

    def add_document(self, ids: Ids, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            ids: token ids; an empty document has no sequences, as in Megatron's tool.
            lengths: tokens of each of its sequences; `None` means a single sequence.
        """
        values = np.asarray(ids, dtype=np.int64)
        cut = ([len(values)] if len(values) else []) if lengths is None else lengths
        self.add_documents(values, np.asarray(cut, np.int64), np.array([len(cut)]))

    def add_documents(
        self,
        ids: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        sequences: npt.NDArray[np.integer],
    ) -> None:
        """Append several documents.

        Example: documents [5, 6], [] and [7] are ids [5, 6, 7], lengths [2, 1] and sequences
        [1, 0, 1].

        Args:
            ids: the token ids of all documents.
            lengths: tokens of each sequence.
            sequences: number of sequences of each document.

        Raises:
            UsageError: an id is negative or not below the vocabulary size, or a sequence is longer
                than the format allows. The error names the document, counted from 0.
        """
        if lengths.sum() != len(ids) or sequences.sum() != len(lengths):
            raise ValueError("lengths and sequences must add up to the ids")
        self._check(ids, lengths, sequences)
        # Lengths and bounds are kept in packed arrays: 12 bytes for a document of one sequence.
        self._stream.write(ids.astype(TYPES[self._code]).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._document_ends.frombytes(
            (self._document_ends[-1] + np.cumsum(sequences, dtype=np.int64)).tobytes()
        )
        self.documents += len(sequences)
        self.sequences += len(lengths)
        self.tokens += len(ids)

    def _check(
        self,
        ids: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        sequences: npt.NDArray[np.integer],
    ) -> None:
        if len(ids) == 0:
            return
        ends = np.append(0, np.cumsum(lengths))[np.cumsum(sequences)]
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            position = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
            document = self.documents + int(np.searchsorted(ends, position, side="right"))
            raise UsageError(
                f"token id in document {document} for {self.prefix}",
                int(ids[position]),
                f">= 0 and <= {self.vocab_size - 1}",
            )
        if lengths.max() > MAX_LENGTH:
            document = self.documents + int(
                np.searchsorted(np.cumsum(sequences), int(lengths.argmax()), side="right")
            )
            raise UsageError(
                f"length of document {document} for {self.prefix}",
                int(lengths.max()),
                f"<= {MAX_LENGTH} tokens",
            )

    def _commit(self) -> None:
        """Finish both files, then rename them.

        The old index is removed first. If the process is killed between the two renames, the new
        `.bin` has no index, which is an error at open, rather than the index of other tokens.
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        with open(self._partial[1], "wb") as index:
            self._write_index(index)
            index.flush()
            os.fsync(index.fileno())
        bin_path, idx_path = paths_of(self.prefix)
        Path(idx_path).unlink(missing_ok=True)
        os.replace(self._partial[0], bin_path)
        os.replace(self._partial[1], idx_path)

    def _write_index(self, stream: BinaryIO) -> None:
        sequences, ends = len(self._lengths), len(self._document_ends)
        stream.write(HEADER.pack(MAGIC, VERSION, self._code, sequences, ends))
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        stream.write(lengths.astype("<i4").data)
        start, size = 0, TYPES[self._code].itemsize
        for first in range(0, sequences, _CHUNK):
            bytes_of = lengths[first : first + _CHUNK].astype(np.int64) * size
            following = start + np.cumsum(bytes_of)
            stream.write((following - bytes_of).astype("<i8").data)
            start = int(following[-1])
        stream.write(np.frombuffer(self._document_ends, dtype=np.int64).astype("<i8").data)
