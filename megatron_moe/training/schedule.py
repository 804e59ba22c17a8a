"""The learning rate as a function of the step.

The values are those of Megatron-Core's `OptimizerParamScheduler` after as many steps, from a pure
function: resuming needs no scheduler state, the step says it all.
"""

from __future__ import annotations

import math

from megatron_moe.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, completed: int, decay_iterations: int) -> float:
    """The learning rate of the step that follows ``completed`` steps.

    Args:
        optimizer: shape, peak, floor and warm-up.
        completed: optimizer steps done so far; 0 for the first step.
        decay_iterations: steps until the floor is reached, warm-up included.

    Returns:
        During warm-up a line from `lr_warmup_init` to `lr`; then the shape of `lr_decay_style`,
        with `inverse-square-root` being lr * sqrt(warmup) / sqrt(step); after ``decay_iterations``
        `min_lr` (but `lr` for `constant`).
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
    progress = (completed - warmup) / (decay_iterations - warmup)
    if optimizer.lr_decay_style == "linear":
        return floor + (peak - floor) * (1.0 - progress)
    return floor + (peak - floor) * 0.5 * (math.cos(math.pi * progress) + 1.0)
