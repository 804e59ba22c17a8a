"""Megatron's indexed format, version 1: the numbers that its writer and its checks share.

`PREFIX.bin` holds the token ids of all sequences, one after the other. `PREFIX.idx` is, little
endian: 9 bytes of magic; u64 version = 1; u8 code of the ids' type; u64 number of sequences; u64
number of documents + 1; i32 length of each sequence, in tokens; i64 byte offset of each sequence;
i64 sequences before each document, then their total.
"""

from __future__ import annotations

import struct

import numpy as np

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
"""Integer types by code. Megatron's codes 6 and 7 are floats, which are no token ids."""
SMALL_VOCABULARY = 65500
"""Below it ids are written as u16, from it on as i32 (Megatron's rule, not the type's limit)."""
MAX_LENGTH = 2**31 - 1
"""Tokens of the longest sequence."""


def paths_of(prefix: str) -> tuple[str, str]:
    """The `.bin` and the `.idx` file of a prefix."""
    return f"{prefix}.bin", f"{prefix}.idx"


def type_code_for(vocab_size: int) -> int:
    """The code of the type that ids of a vocabulary are written in."""
    return 8 if vocab_size < SMALL_VOCABULARY else 4
