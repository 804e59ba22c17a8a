"""The learning rate as a function of the step, or of the consumed sequences.

A pure function with the values of Megatron-Core's `OptimizerParamScheduler`: resuming needs no
scheduler state, and a changed schedule takes effect at the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class RateLengths:
    """The lengths of a learning-rate schedule, all in one unit."""

    unit: Literal["iterations", "samples"]
    """Steps, or sequences. With a batch-size ramp-up the two are not proportional."""
    warmup: float
    """Length of the warm-up; `--lr-warmup-fraction` may give a fraction of a step."""
    decay: int
    """Until the floor is reached, warm-up included."""
    wsd_decay: int | None
    """Length of the decay at the end of `WSD`."""


def learning_rate(optimizer: OptimizerConfig, lengths: RateLengths, completed: int) -> float:
    """The learning rate of the step that follows ``completed`` steps or sequences.

    Args:
        optimizer: shape, peak and floor.
        lengths: of warm-up and decay.
        completed: done so far, in the unit of ``lengths``; 0 for the first step.

    Returns:
        During warm-up a line from `lr_warmup_init` to `lr`; then the shape of `lr_decay_style`,
        with `inverse-square-root` being lr * sqrt(warmup) / sqrt(completed), and `WSD` staying at
        `lr` until its last `wsd_decay`; after `decay` `min_lr` (but `lr` for `constant`).
    """
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, lengths.warmup
    if warmup > 0 and completed <= warmup:
        start = optimizer.lr_warmup_init
        return start + (peak - start) * completed / warmup
    if optimizer.lr_decay_style == "constant":
        return peak
    if completed > lengths.decay:
        return floor
    if optimizer.lr_decay_style == "inverse-square-root":
        return max(floor, peak * math.sqrt(max(warmup, 1)) / math.sqrt(max(completed, 1)))
    if optimizer.lr_decay_style == "WSD":
        assert lengths.wsd_decay is not None
        stable = lengths.decay - lengths.wsd_decay
        progress = max(completed - stable, 0) / lengths.wsd_decay
        return floor + (peak - floor) * _SHAPES[optimizer.lr_wsd_decay_style](progress)
    progress = (completed - warmup) / (lengths.decay - warmup)
    return floor + (peak - floor) * _SHAPES[optimizer.lr_decay_style](progress)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""How far from the peak (1) to the floor (0), by the share of the decay that is done."""
