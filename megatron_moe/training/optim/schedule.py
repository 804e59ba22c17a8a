"""The learning rate as a function of the step.

A pure function with the values of Megatron-Core's `OptimizerParamScheduler`: resuming needs no
scheduler state, and a changed schedule takes effect at the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_moe.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, completed: int, decay_iterations: int) -> float:
    """The learning rate of the step that follows ``completed`` steps.

    Args:
        optimizer: shape, peak, floor and warm-up.
        completed: optimizer steps done so far; 0 for the first step.
        decay_iterations: steps until the floor is reached, warm-up included.

    Returns:
        During warm-up a line from `lr_warmup_init` to `lr`; then the shape of `lr_decay_style`,
        with `inverse-square-root` being lr * sqrt(warmup) / sqrt(step), and `WSD` staying at `lr`
        until its last `lr_wsd_decay_iters`; after ``decay_iterations`` `min_lr` (but `lr` for
        `constant`).
    """
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_iters
    if warmup > 0 and completed <= warmup:
        start = optimizer.lr_warmup_init
        return start + (peak - start) * completed / warmup
    if optimizer.lr_decay_style == "constant":
        return peak
    if completed > decay_iterations:
        return floor
    if optimizer.lr_decay_style == "inverse-square-root":
        return max(floor, peak * math.sqrt(max(warmup, 1)) / math.sqrt(max(completed, 1)))
    if optimizer.lr_decay_style == "WSD":
        assert optimizer.lr_wsd_decay_iters is not None
        stable = decay_iterations - optimizer.lr_wsd_decay_iters
        progress = max(completed - stable, 0) / optimizer.lr_wsd_decay_iters
        return floor + (peak - floor) * _SHAPES[optimizer.lr_wsd_decay_style](progress)
    progress = (completed - warmup) / (decay_iterations - warmup)
    return floor + (peak - floor) * _SHAPES[optimizer.lr_decay_style](progress)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""How far from the peak (1) to the floor (0), by the share of the decay that is done."""
