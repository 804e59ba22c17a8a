"""Warnings that say, on every rank, what a CPU run knows already."""

from __future__ import annotations

import warnings

from megatron_moe.platform.patches.base import Patch

_FILTERS: tuple[tuple[str, type[Warning]], ...] = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    ("full scope is deprecated", UserWarning),
    ("`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", Warning),
)


class KnownWarnings(Patch):
    """The engine's fallbacks without GPU libraries, and its own uses of what is deprecated.

    On a GPU they are news, and are shown.
    """

    name = "known-warnings"

    def __init__(self) -> None:
        self._entries: list[tuple[object, ...]] = []

    def apply(self) -> None:
        for message, category in _FILTERS:
            warnings.filterwarnings("ignore", message=message, category=category)
            self._entries.append(warnings.filters[0])

    def undo(self) -> None:
        while self._entries:
            entry = self._entries.pop()
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]
