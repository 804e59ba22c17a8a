"""Reads .zst files as a stream, and detects truncated ones.

The library's own stream readers return the available part of a truncated file and then report the
end of the file, which would silently lose the rest of a corpus.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from megatron_moe.errors import UsageError

_CHUNK = 1 << 17
"""Compressed bytes that are read at a time."""
_LARGEST_WINDOW = 1 << 31
"""Bytes of the largest window, that of `zstd --long=31`, as in some large dumps. The library's own
limit is 128 MiB. A frame takes as much memory as its window, or as its content if that is less."""


class ZstdReader(io.RawIOBase):
    """Decompressed content of one or more frames.

    Raises:
        UsageError: zstandard is not installed.
        EOFError: the file ends within a frame.
        OSError: the file is not Zstandard, or damaged.
    """

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install zstandard"
            expected = "read with zstandard installed"
            raise UsageError("--input", raw.name, expected, fix) from None
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        """Decompressor of the current frame; `None` between frames."""
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of ``buffer``; return 0 at the end of the last frame."""
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a Zstandard frame")
                return 0
            self._ready = self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            library = self._library.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
            self._frame = library.decompressobj()
        try:
            ready: bytes = self._frame.decompress(self._compressed)
        except self._library.ZstdError as error:
            raise OSError(str(error)) from None
        # Data after the end of a frame is the start of the next one.
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return ready
