"""How long a run is: everything about its length that follows from configuration and layout.

Checked before any process group exists, so that a mistake ends every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config import OptimizerConfig, RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.config.ranges import check_ranges
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The length of a run, in optimizer steps."""

    iterations: int
    """Steps of the whole run, over all its restarts."""
    decay_iterations: int
    """Steps until the learning rate reaches its floor."""
    batch_sizes: BatchSizes
    """Sequences of each step."""


def resolve_plan(config: RunConfig, global_batch_size: int) -> TrainingPlan:
    """Work out the plan and check everything that it depends on.

    Args:
        config: the run.
        global_batch_size: sequences of one step, once it is full, as the layout resolved it.

    Raises:
        UsageError: a length, interval or rate that cannot be meant.
    """
    check_ranges(config)
    batch_sizes = BatchSizes.of(config.train, global_batch_size)
    iterations = _iterations(config, batch_sizes)
    if config.checkpoint.save_interval is not None and config.checkpoint.save is None:
        raise UsageError("--save-interval", config.checkpoint.save_interval, "--save with it")
    decay = config.optimizer.lr_decay_iters or iterations
    _check_optimizer(config, decay)
    _check_adafactor(config)
    _check_freezing(config)
    return TrainingPlan(
        iterations=iterations,
        decay_iterations=decay,
        batch_sizes=batch_sizes,
    )


def _iterations(config: RunConfig, batch_sizes: BatchSizes) -> int:
    iterations, samples = config.train.train_iters, config.train.train_samples
    if iterations is not None and samples is not None:
        raise UsageError("--train-iters", iterations, "no --train-samples", "give one of the two")
    if samples is not None:
        if samples < batch_sizes.start:
            expected = f"at least one global batch ({batch_sizes.start} sequences)"
            raise UsageError("--train-samples", samples, expected)
        return batch_sizes.iterations_of(samples)
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
    ends = optimizer.lr_decay_style in ("linear", "cosine", "WSD")
    if ends and optimizer.lr_warmup_iters >= decay:
        expected = f"below the steps of the decay ({decay}) with {optimizer.lr_decay_style} decay"
        raise UsageError("--lr-warmup-iters", optimizer.lr_warmup_iters, expected)
    _check_wsd(optimizer, decay)
    if config.parallel.use_distributed_optimizer and optimizer.optimizer == "sgd":
        expected = "off with --optimizer sgd: the engine shards the state of Adam alone"
        raise UsageError("--use-distributed-optimizer", "on", expected)


def _check_wsd(optimizer: OptimizerConfig, decay: int) -> None:
    flag, steps = "--lr-wsd-decay-iters", optimizer.lr_wsd_decay_iters
    if optimizer.lr_decay_style != "WSD":
        if steps is not None:
            raise UsageError(flag, steps, "no value without --lr-decay-style WSD")
        return
    longest = decay - optimizer.lr_warmup_iters
    if steps is None or not 1 <= steps <= longest:
        expected = f"1 to {longest}, the steps between warm-up and the end of the decay"
        raise UsageError(flag, steps, expected)


def _check_freezing(config: RunConfig) -> None:
    if config.optimizer.freeze_params or config.optimizer.freeze_router_after is not None:
        # Imported here: it needs torch, which --describe does not.
        from megatron_moe.training.optim.freezing import check_freezing

        check_freezing(config)


def _check_adafactor(config: RunConfig) -> None:
    settings = config.optimizer
    if settings.optimizer != "adafactor":
        return
    if config.parallel.use_distributed_optimizer:
        raise UsageError(
            "--use-distributed-optimizer",
            True,
            "False with --optimizer adafactor",
            "it cuts parameters at any element, and Adafactor needs whole rows and columns",
        )
    if settings.used_weight_decay > 0:
        expected = "0 with --optimizer adafactor, which has no weight decay"
        raise UsageError("--weight-decay", settings.used_weight_decay, expected)
