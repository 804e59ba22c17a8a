"""A progress bar on standard error: share done, rate, remaining time."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

Advance = Callable[[int], object]
"""Takes how much more is done."""


def nobody(more: int) -> None:
    """Tells nobody."""


def progress_bar(total: int, unit: str, shown: bool | None = None) -> tqdm[None]:
    """A context manager whose `update` is an `Advance`.

    Args:
        total: what is done when all is done.
        unit: what is counted, e.g. `B`.
        shown: `None` shows it on a terminal only, so that logs and pipes stay clean.
    """
    hidden = None if shown is None else not shown
    return tqdm(total=total, unit=unit, unit_scale=True, disable=hidden, mininterval=0.5)
