"""Reading tensor files: mapped into memory, so that only what is touched is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_moe.errors import Corrupt

OPEN_FILES = 64
"""Files that one reader keeps open."""


class TensorFiles:
    """Tensors of the safetensors files of a directory, mapped: only what is touched is read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}

    def tensor(self, file: str, key: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """One tensor, as a view of the mapped file.

        Raises:
            Corrupt: the file does not hold it so.
        """
        try:
            handle = self._handle(file)
            part = handle.get_slice(key)
            found = (part.get_dtype(), tuple(part.get_shape()))
            if found == (dtype, tuple(shape)):
                return handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise Corrupt(str(self.directory / file), f"{error}", f"to hold {key}") from None
        raise Corrupt(f"{key} in {self.directory / file}", found, f"{dtype} of shape {shape}")

    def metadata(self, file: str) -> dict[str, str]:
        """The strings in a file's header."""
        try:
            return self._handle(file).metadata() or {}
        except (SafetensorError, OSError) as error:
            raise Corrupt(str(self.directory / file), f"{error}", "a safetensors file") from None

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[file] = safe_open(str(self.directory / file), framework="pt")
        return self._open[file]
