"""Sentences that several analyses of weights share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megatron_moe.analysis.weights.statistics import Array, rank_correlation

_FEWEST = 5
"""Layers from which a trend over depth is named."""
_CLEAR = 0.5
"""Rank correlation from which there is one; at five layers chance reaches it in 39% of cases, at
ten in 14%, at thirty in 0.5%."""


def sentence_for_each(readings: Mapping[str, str]) -> str:
    """Readings of several checkpoints, each behind its label if there are more than one."""
    if len(readings) == 1:
        return next(iter(readings.values()))
    return " ".join(f"{label}: {text}" for label, text in readings.items())


def listed(numbers: Mapping[str, float], prefix: str, form: str = ".2f") -> str:
    """Headline numbers that begin with ``prefix``: `up 0.12, gate 0.10, down undefined`."""
    return ", ".join(
        f"{name.removeprefix(prefix)} {'undefined' if math.isnan(value) else format(value, form)}"
        for name, value in numbers.items()
        if name.startswith(prefix)
    )


def depth_trend(mean_L: Array) -> str:
    """How similarity changes with depth, beside what Lo et al. found; empty for few layers."""
    if len(mean_L) < _FEWEST or np.isnan(mean_L).any():
        return ""
    before_L = mean_L[:-1]
    found = rank_correlation(np.arange(len(before_L), dtype=float), before_L)
    if found < -_CLEAR:
        trend = f"Similarity falls with depth (rank correlation {found:.2f}), as in the paper"
    elif found > _CLEAR:
        trend = f"Similarity rises with depth (rank correlation {found:.2f}), unlike in the paper"
    elif math.isnan(found):
        return ""
    else:
        trend = f"Similarity has no clear trend over depth (rank correlation {found:.2f})"
    rises = mean_L[-1] > mean_L[-2]
    last = (
        "the last layer is above the one before it" if rises else "the last layer is no exception"
    )
    beside = ", as there" if rises and found < -_CLEAR else ""
    return f" {trend}; {last}{beside}."
