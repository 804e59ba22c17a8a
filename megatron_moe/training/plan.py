"""How long a run is: everything about its length that follows from configuration and layout.

Checked before any process group exists, so that a mistake ends every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config import OptimizerConfig, RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.errors import UsageError
from megatron_moe.training.freezing import check_freezing


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
    batch_sizes = BatchSizes.of(config.train, global_batch_size)
    iterations = _iterations(config, batch_sizes)
    _check_intervals(config)
    decay = config.optimizer.lr_decay_iters or iterations
    _check_optimizer(config.optimizer, decay)
    _check_adafactor(config)
    check_freezing(config)
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
    _at_least("--train-iters", iterations, 1)
    return iterations


def _check_intervals(config: RunConfig) -> None:
    _at_least("--eval-interval", config.train.eval_interval, 1)
    _at_least("--eval-iters", config.train.eval_iters, 0)
    _at_least("--log-interval", config.logging.log_interval, 1)
    for flag, value in (
        ("--exit-interval", config.train.exit_interval),
        ("--save-interval", config.checkpoint.save_interval),
    ):
        if value is not None:
            _at_least(flag, value, 1)
    if config.checkpoint.save_interval is not None and config.checkpoint.save is None:
        raise UsageError("--save-interval", config.checkpoint.save_interval, "--save with it")


def _check_optimizer(optimizer: OptimizerConfig, decay: int) -> None:
    for flag, value in (
        ("--lr", optimizer.lr),
        ("--min-lr", optimizer.min_lr),
        ("--lr-warmup-init", optimizer.lr_warmup_init),
        ("--weight-decay", optimizer.used_weight_decay),
        ("--clip-grad", optimizer.used_clip_grad),
        ("--lr-warmup-iters", optimizer.lr_warmup_iters),
    ):
        _at_least(flag, value, 0)
    _at_least("--lr-decay-iters", decay, 1)
    for flag, value in (
        ("--min-lr", optimizer.min_lr),
        ("--lr-warmup-init", optimizer.lr_warmup_init),
    ):
        if value > optimizer.lr:
            raise UsageError(flag, value, f"at most --lr ({optimizer.lr})")
    for flag, value in (
        ("--adam-beta1", optimizer.adam_beta1),
        ("--adam-beta2", optimizer.adam_beta2),
        ("--sgd-momentum", optimizer.sgd_momentum),
    ):
        if not 0.0 <= value < 1.0:
            raise UsageError(flag, value, "a number from 0 to below 1")
    ends = optimizer.lr_decay_style in ("linear", "cosine", "WSD")
    if ends and optimizer.lr_warmup_iters >= decay:
        expected = f"below the steps of the decay ({decay}) with {optimizer.lr_decay_style} decay"
        raise UsageError("--lr-warmup-iters", optimizer.lr_warmup_iters, expected)
    _check_wsd(optimizer, decay)


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


def _check_adafactor(config: RunConfig) -> None:
    settings = config.optimizer
    for flag, value in (
        ("--adafactor-decay-rate", settings.adafactor_decay_rate),
        ("--adafactor-clip-threshold", settings.adafactor_clip_threshold),
    ):
        if not value > 0:
            raise UsageError(flag, value, "a number above 0")
    _at_least("--adafactor-min-dim", settings.adafactor_min_dim, 1)
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


def _at_least(flag: str, value: float, least: int) -> None:
    """Also refuses NaN, which is not at least anything."""
    if not value >= least:
        raise UsageError(flag, value, f"at least {least}")
