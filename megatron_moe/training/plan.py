"""How many steps a run takes: what follows from its configuration and the sequences of a step.

Resolved before any process group exists, so that an error ends every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config import OptimizerConfig, RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The length of a run, in optimizer steps."""

    iterations: int
    """Steps of the whole run, including those before a restart."""
    decay_iterations: int
    """Steps until the learning rate reaches its minimum."""
    batch_sizes: BatchSizes
    """Sequences of each step."""


def resolve_plan(config: RunConfig, global_batch_size: int) -> TrainingPlan:
    """Resolve the plan and check the settings that depend on the number of steps.

    Args:
        config: the run.
        global_batch_size: sequences of a step after the ramp-up, as the layout resolved them.

    Raises:
        UsageError: no length, one shorter than a step, a warm-up or decay that does not fit into
            the run, or patterns of frozen parameters that select nothing or everything.
    """
    batch_sizes = BatchSizes.of(config.train, global_batch_size)
    iterations = _iterations(config, batch_sizes)
    decay = config.optimizer.lr_decay_iters or iterations
    _check_decay(config.optimizer, decay)
    _check_freezing(config)
    return TrainingPlan(
        iterations=iterations,
        decay_iterations=decay,
        batch_sizes=batch_sizes,
    )


def _iterations(config: RunConfig, batch_sizes: BatchSizes) -> int:
    iterations, samples = config.train.train_iters, config.train.train_samples
    if samples is not None:
        if samples < batch_sizes.start:
            expected = f">= {batch_sizes.start}, one global batch"
            raise UsageError("--train-samples", samples, expected)
        return batch_sizes.iterations_of(samples)
    if iterations is None:
        raise UsageError("--train-iters", None, "a number of steps", "or set --train-samples")
    return iterations


def _check_decay(optimizer: OptimizerConfig, decay: int) -> None:
    """Warm-up, and the decay at the end of WSD, fit into the steps of the learning rate."""
    style, warmup = optimizer.lr_decay_style, optimizer.lr_warmup_iters
    # The other styles have no end: a run may stop within their warm-up, as OpenMoE's recipe may.
    if style in ("linear", "cosine", "WSD") and warmup >= decay:
        expected = f"< {decay}, the steps of the {style} decay"
        raise UsageError("--lr-warmup-iters", warmup, expected)
    steps, longest = optimizer.lr_wsd_decay_iters, decay - warmup
    if style == "WSD" and (steps is None or steps > longest):
        expected = f"<= {longest}, the steps between warm-up and the end of the decay"
        raise UsageError("--lr-wsd-decay-iters", steps, expected)


def _check_freezing(config: RunConfig) -> None:
    if config.optimizer.freeze_params or config.optimizer.freeze_router_after is not None:
        # Imported here: it needs torch, which --describe does not.
        from megatron_moe.training.optim.freezing import check_freezing

        check_freezing(config)
