"""One optimizer step: micro-batches through the pipeline, exact loss, gradient, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.data.batch import Batch
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.training.finite import LocalFlags, stop_run
from megatron_moe.training.losses import count_targets, forward_function, total_sums
from megatron_moe.training.optim.optimizer import clip_gradients, grad_norm, set_rates
from megatron_moe.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step leaves behind."""

    sums: Tensor
    """This rank's part of the loss sums, fp64 [3] on the device; see `losses.total_sums`."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""


def train_step(
    run: TrainingRun, batches: Sequence[Batch | None], learning_rate: float, iteration: int
) -> StepResult:
    """Forward, backward and update of one global batch.

    Args:
        run: the run; its parameters change.
        batches: this rank's micro-batches, ``None`` for each if its stage needs no data.
        learning_rate: of this update.
        iteration: number of this step, from 1, for messages.

    Raises:
        NonFiniteError: on every rank, with all parameters and moments unchanged, if any gradient
            anywhere is infinite or not a number.
    """
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    targets = count_targets(batches, run) if run.has_loss else None
    flags = LocalFlags(run)
    forward = forward_function(run, targets, len(batches))
    reported = forward_backward(run.ctx, forward, batches, run.wrapped, before_reduction=flags.look)
    sums = total_sums(reported, run)
    norm = update(run, learning_rate, flags, iteration)
    return StepResult(sums=sums, grad_norm=norm)


def update(run: TrainingRun, learning_rate: float, flags: LocalFlags, iteration: int) -> float:
    """Apply the reduced gradients, unless they are not finite; returns their norm."""
    frozen = run.freezing.at(iteration)
    frozen.drop_gradients()
    run.optimizer.prepare_grads()
    frozen.hide()
    norm = grad_norm(run.optimizer, run.ctx.platform.device)
    if not math.isfinite(norm):
        stop_run(run, flags, iteration, norm)
    clip_gradients(run.optimizer, norm, run.config.optimizer.used_clip_grad)
    set_rates(run.optimizer, run.config.optimizer, learning_rate)
    with frozen.undisturbed():
        run.optimizer.step_with_ready_grads()
    return norm
