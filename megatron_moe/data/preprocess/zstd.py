"""Reads .zst files as a stream, and notices when one is cut off.

The library's own stream readers give what there is of a truncated file and end without a word,
which would lose the rest of a corpus silently.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from megatron_moe.errors import UsageError

_CHUNK = 1 << 17
"""Packed bytes that are read at once."""


class ZstdReader(io.RawIOBase):
    """The content of one or several frames, one after the other.

    Raises:
        UsageError: zstandard is not installed.
        EOFError: the file ends within a frame.
        OSError: it is no Zstandard file, or damaged.
    """

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install zstandard"
            what = "zstandard installed, to read .zst"
            raise UsageError("--input", raw.name, what, fix) from None
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        """The frame under way."""
        self._packed = self._ready = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill some of ``buffer``; 0 at the end of the last frame."""
        while not self._ready:
            self._packed = self._packed or self._raw.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a Zstandard frame")
                return 0
            self._ready = self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self) -> bytes:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            ready: bytes = self._frame.decompress(self._packed)
        except self._library.ZstdError as error:
            raise OSError(str(error)) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return ready
