"""How long a run is: everything about its length that follows from configuration and layout.

Checked before any process group exists, so that a mistake ends every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.config.ranges import check_ranges
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The length of a run, in optimizer steps."""

    iterations: int
    """Steps of the whole run, over all its restarts."""
    decay_iterations: int
    """Steps until the learning rate reaches its floor."""
    global_batch_size: int
    """Sequences of one step."""
    tokens_per_step: int
    """Positions of one step, padding included."""


def resolve_plan(config: RunConfig, global_batch_size: int) -> TrainingPlan:
    """Work out the plan and check everything that it depends on.

    Args:
        config: the run.
        global_batch_size: sequences of one step, as the layout resolved it.

    Raises:
        UsageError: a length, interval or rate that cannot be meant.
    """
    check_ranges(config)
    iterations = _iterations(config, global_batch_size)
    if config.checkpoint.save_interval is not None and config.checkpoint.save is None:
        raise UsageError("--save-interval", config.checkpoint.save_interval, "--save with it")
    decay = config.optimizer.lr_decay_iters or iterations
    _check_optimizer(config, decay)
    return TrainingPlan(
        iterations=iterations,
        decay_iterations=decay,
        global_batch_size=global_batch_size,
        tokens_per_step=global_batch_size * config.data.seq_length,
    )


def _iterations(config: RunConfig, global_batch_size: int) -> int:
    iterations, samples = config.train.train_iters, config.train.train_samples
    if iterations is not None and samples is not None:
        raise UsageError("--train-iters", iterations, "no --train-samples", "give one of the two")
    if samples is not None:
        if samples < global_batch_size:
            expected = f"at least one global batch ({global_batch_size} sequences)"
            raise UsageError("--train-samples", samples, expected)
        return samples // global_batch_size
    if iterations is None:
        raise UsageError("--train-iters", None, "a number of steps", "or give --train-samples")
    return iterations


def _check_optimizer(config: RunConfig, decay: int) -> None:
    optimizer = config.optimizer
    for flag, value in (
        ("--min-lr", optimizer.min_lr),
        ("--lr-warmup-init", optimizer.lr_warmup_init),
    ):
        if value > optimizer.lr:
            raise UsageError(flag, value, f"at most --lr ({optimizer.lr})")
    if optimizer.lr_decay_style in ("linear", "cosine") and optimizer.lr_warmup_iters >= decay:
        expected = f"below the steps of the decay ({decay}) with {optimizer.lr_decay_style} decay"
        raise UsageError("--lr-warmup-iters", optimizer.lr_warmup_iters, expected)
    if config.parallel.use_distributed_optimizer and optimizer.optimizer != "adam":
        expected = f"off with --optimizer {optimizer.optimizer}: only Adam's state is sharded"
        raise UsageError("--use-distributed-optimizer", "on", expected)
