"""Reads .zst files as a stream in bounded memory, and detects truncated ones.

The library's own stream readers return the available part of a truncated file and then report the
end of the file, which would silently lose the rest of a corpus. Its objects for whole frames return
everything that their input holds, and four bytes can hold 128 KiB of one character. So the blocks
of a frame are counted here, and a few are decompressed at a time. Source of the layout: RFC 8878.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from megatron_moe.errors import UsageError

SMALLEST_WINDOW = 1 << 27
"""Bytes of a window that is always accepted: 128 MiB, as in the program `zstd` itself. A frame
takes as much memory as its window, or as its content if that is less."""
_LARGEST_WINDOW = 1 << 31
"""That of `zstd --long=31`, as in some large dumps: the most that the library can have."""
_BLOCKS = 16
"""Blocks that are decompressed at a time; each has at most 128 KiB of content."""
_SKIPPED = 1 << 20
"""Bytes of a skippable frame that are read at a time."""
_MAGIC, _SKIPPABLE = b"\x28\xb5\x2f\xfd", (b"\x2a\x4d\x18", range(0x50, 0x60))
_RLE = 1
"""Type of a block that repeats its only byte."""
_DICTIONARY, _CONTENT = (0, 1, 2, 4), (0, 2, 4, 8)
"""Bytes of these fields of a frame's header, by their flags."""


class ZstdReader(io.RawIOBase):
    """Decompressed content of one or more frames.

    Args:
        raw: the file.
        window: bytes of the largest window, if it is more than `SMALLEST_WINDOW`.

    Raises:
        UsageError: zstandard is not installed.
        EOFError: the file ends within a frame.
        OSError: the file is not Zstandard, damaged, or needs a larger window.
    """

    def __init__(self, raw: BinaryIO, window: int = SMALLEST_WINDOW) -> None:
        try:
            import zstandard
        except ImportError:
            fix = "pip install 'megatron-moe[data]', or pip install zstandard"
            expected = "read with zstandard installed"
            raise UsageError("--input", raw.name, expected, fix) from None
        self._raw, self._library = raw, zstandard
        self._window = min(max(window, SMALLEST_WINDOW), _LARGEST_WINDOW)
        self._frame: Any = None
        """Decompressor of the current frame; `None` between frames."""
        self._has_checksum = False
        self._ready = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of ``buffer``; return 0 at the end of the last frame."""
        while not self._ready:
            compressed = self._header() if self._frame is None else self._blocks()
            if not compressed:
                return 0
            try:
                self._ready = self._frame.decompress(compressed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _header(self) -> bytes:
        """The header of the next frame that has content; empty at the end of the file."""
        while (magic := self._raw.read(4)) and magic[1:] == _SKIPPABLE[0]:
            if magic[0] not in _SKIPPABLE[1]:
                break
            self._skip(int.from_bytes(self._exactly(4), "little"))
        if not magic:
            return b""
        if magic != _MAGIC:
            if _MAGIC.startswith(magic):
                raise EOFError("the file ends within a Zstandard frame")
            raise OSError(f"it is not Zstandard: a frame begins with {magic!r}")
        flags = self._exactly(1)[0]
        single = flags >> 5 & 1
        size = (1 - single) + _DICTIONARY[flags & 3] + (_CONTENT[flags >> 6] or single)
        header = magic + bytes([flags]) + self._exactly(size)
        try:
            window = self._library.get_frame_parameters(header).window_size
        except self._library.ZstdError as error:
            raise OSError(str(error)) from None
        if window > self._window:
            needs = f"its window of {window} bytes is larger than {self._window}"
            raise OSError(f"{needs}; if the file is not hostile, --max-record-bytes {window}")
        library = self._library.ZstdDecompressor(max_window_size=self._window)
        self._frame, self._has_checksum = library.decompressobj(), bool(flags >> 2 & 1)
        return header

    def _blocks(self) -> bytes:
        """The next blocks of a frame, and the checksum after the last."""
        parts: list[bytes] = []
        for _ in range(_BLOCKS):
            head = self._exactly(3)
            value = int.from_bytes(head, "little")
            size = 1 if value >> 1 & 3 == _RLE else value >> 3
            parts += [head, self._exactly(size)]
            if value & 1:
                parts.append(self._exactly(4 if self._has_checksum else 0))
                break
        return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        found = self._raw.read(size)
        if len(found) < size:
            raise EOFError("the file ends within a Zstandard frame")
        return found

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._exactly(min(size, _SKIPPED)))
