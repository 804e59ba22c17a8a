"""The layout of Megatron's indexed format, version 1, for its writer, readers and checks.

`PREFIX.bin` holds the token ids of all sequences, one after the other. `PREFIX.idx` holds, little
endian, with N sequences and D documents:

    bytes                       content
    34                          header: 9 bytes of magic, u64 version = 1, u8 code of the id type,
                                u64 N, u64 D + 1
    4 N                         i32 length of each sequence, in tokens
    8 N                         i64 offset of each sequence in the `.bin`, in bytes
    8 (D + 1)                   i64 document bounds: sequences before each document, then N

Example: documents [5, 6], [] and [7] in 16 bits are three documents and two sequences: lengths
2 1, offsets 0 4, document bounds 0 1 1 2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type code, sequences, documents + 1."""
VERSION = 1
TYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Integer types by code. Megatron's codes 6 and 7 are floats, which cannot be token ids."""
SMALL_VOCABULARY = 65500
"""Ids of smaller vocabularies are u16, others i32 (Megatron's rule, not the limit of the type)."""
MAX_LENGTH = 2**31 - 1
"""Tokens of the longest sequence."""


def paths_of(prefix: str) -> tuple[str, str]:
    """Return the paths of the `.bin` and the `.idx` file of a prefix."""
    return f"{prefix}.bin", f"{prefix}.idx"


def type_code_for(vocab_size: int) -> int:
    """Return the code of the type in which ids of a vocabulary are written."""
    return 8 if vocab_size < SMALL_VOCABULARY else 4


def offsets_position(sequences: int) -> int:
    """Return where the sequence offsets start in the `.idx`, in bytes."""
    return HEADER.size + 4 * sequences


def bounds_position(sequences: int) -> int:
    """Return where the document bounds start in the `.idx`, in bytes."""
    return HEADER.size + 12 * sequences


def index_size(sequences: int, bounds: int) -> int:
    """Return the bytes of an `.idx` with this many sequences and document bounds (D + 1)."""
    return bounds_position(sequences) + 8 * bounds


def read_chunks(
    path: str, dtype: str, position: int, count: int, chunk: int
) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
    """Read an array of a file in pieces, so that memory does not depend on its size.

    Args:
        path: the file.
        dtype: type of the entries.
        position: byte where the array starts.
        count: entries of the array.
        chunk: entries of a piece.

    Yields:
        The number of the first entry of a piece, and the piece.
    """
    size = np.dtype(dtype).itemsize
    for first in range(0, count, chunk):
        wanted = min(chunk, count - first)
        yield first, np.fromfile(path, dtype, wanted, offset=position + size * first)
