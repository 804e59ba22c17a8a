"""A progress bar on standard error: share done, rate, remaining time."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

Advance = Callable[[int], object]
"""Called with the amount of work done since the last call, such as a number of bytes."""


def ignore_progress(_more: int) -> None:
    """An `Advance` that does nothing."""


def progress_bar(total: int, unit: str, shown: bool | None = None) -> tqdm[None]:
    """Make a context manager whose `update` is an `Advance`.

    Args:
        total: the amount of all work.
        unit: what is counted, e.g. `B`.
        shown: `None` shows the bar on a terminal only, so that logs and pipes stay clean.
    """
    hidden = None if shown is None else not shown
    return tqdm(total=total, unit=unit, unit_scale=True, disable=hidden, mininterval=0.5)
