"""Counts the bytes of all tensors that exist while code runs, by category, and their peak.

    live = LiveMemory()
    with live:
        build(); live.mark(parameters, "parameters")
        step()
        live.reset_peak()
        step()
    live.peak.logits

Every storage that an operation creates is counted once, however many tensors view it, until it is
freed. Works on real tensors of any device and on fake ones, which have sizes but no memory. What a
kernel allocates inside itself (workspaces) and what an allocator rounds up is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_moe.planning.memory import CATEGORIES, MemoryByCategory
from megatron_moe.planning.scopes import backward_node

Classify = Callable[[Tensor], str]
"""The category of a tensor that an operation has just created."""


@dataclass
class _Entry:
    bytes: int
    category: str
    what: str


class LiveMemory(TorchDispatchMode):
    """Storages that exist, and the moment with the most bytes.

    Args:
        classify: the category of a new storage by the first tensor on it; by default all are
            activations. `mark` overrides it.
        detail: keep a list of what exists at the peak, which takes time.

    Attributes:
        peak: bytes at the moment with the most, by category.
        peak_tensors: with ``detail``, how many storages of each category and shape there were.
        peak_operation: the operation that reached it.
        peak_place: where it ran: the autograd node, or the nearest line of this project.
    """

    def __init__(self, classify: Classify | None = None, detail: bool = False) -> None:
        super().__init__()
        self._classify = classify or (lambda tensor: "activations")
        self._detail = detail
        self._entries: dict[int, _Entry] = {}
        self._bytes = dict.fromkeys(CATEGORIES, 0)
        self._total = 0
        self.peak = MemoryByCategory()
        self.peak_tensors: Counter[tuple[str, str, int]] = Counter()
        self.peak_operation, self.peak_place = "", ""

    @property
    def now(self) -> MemoryByCategory:
        """Bytes at this moment."""
        return MemoryByCategory(**self._bytes)

    def reset_peak(self) -> None:
        """Start a new search for the peak, from what exists now."""
        self.peak, self.peak_operation, self.peak_place = self.now, "start", ""

    def mark(self, tensors: Iterable[Tensor], category: str) -> None:
        """Put the storages of tensors into a category, created under this mode or not."""
        for tensor in tensors:
            entry = self._entry_of(tensor, category)
            self._count(category, entry.bytes)
            self._count(entry.category, -entry.bytes)
            entry.category = category

    def category_of(self, tensor: Tensor) -> str | None:
        """Of a tensor's storage; `None` if it is not counted."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry.category

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._entry_of(leaf)
        if self._total > self.peak.total:
            self.peak, self.peak_operation, self.peak_place = self.now, str(func), _place()
            if self._detail:
                found = self._entries.values()
                self.peak_tensors = Counter((e.category, e.what, e.bytes) for e in found)
        return result

    def _entry_of(self, tensor: Tensor, category: str | None = None) -> _Entry:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._entries:
            if category is None:
                category = self._classify(tensor)
            what = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            self._entries[key] = entry = _Entry(storage.nbytes(), category, what)
            self._count(category, entry.bytes)
            # PyTorch keeps one Python object for a storage as long as the storage exists.
            weakref.finalize(storage, self._freed, key).atexit = False
        return self._entries[key]

    def _freed(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._count(entry.category, -entry.bytes)

    def _count(self, category: str, change: int) -> None:
        self._bytes[category] += change
        self._total += change


def _place() -> str:
    if node := backward_node():
        return node
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in ("megatron_moe", "fused_kernels"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a caller outside of this project"


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
