"""How many steps a run takes: what follows from its configuration and the sequences of a step.

Resolved before any process group exists, so that an error ends every rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config import OptimizerConfig, RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.errors import UsageError
from megatron_moe.training.optim.schedule import RateLengths


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The length of a run, in optimizer steps."""

    iterations: int
    """Steps of the whole run, including those before a restart."""
    rate: RateLengths
    """Lengths of the learning rate's warm-up and decay."""
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
    rate = rate_lengths(config, iterations)
    _check_decay(config.optimizer, rate)
    _check_freezing(config)
    return TrainingPlan(
        iterations=iterations,
        rate=rate,
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


def counts_samples(config: RunConfig) -> bool:
    """Whether the learning rate counts consumed sequences instead of steps.

    A fraction has no unit of its own: as in Megatron-LM, it is of the sequences with
    `--train-samples`.
    """
    of_samples = config.train.train_samples is not None
    return config.optimizer.lr_in_samples or (
        of_samples and config.optimizer.lr_warmup_fraction is not None
    )


def rate_lengths(config: RunConfig, iterations: int) -> RateLengths:
    """The lengths of the learning-rate schedule of a run of so many steps."""
    settings, warmup = config.optimizer, config.optimizer.lr_warmup_fraction
    if not counts_samples(config):
        decay = settings.lr_decay_iters or iterations
        return RateLengths(
            unit="iterations",
            warmup=settings.lr_warmup_iters if warmup is None else warmup * decay,
            decay=decay,
            wsd_decay=settings.lr_wsd_decay_iters,
        )
    samples = settings.lr_decay_samples or config.train.train_samples
    assert samples is not None, "validate requires --train-samples, and a phase is given its decay"
    return RateLengths(
        unit="samples",
        warmup=settings.lr_warmup_samples if warmup is None else warmup * samples,
        decay=samples,
        wsd_decay=settings.lr_wsd_decay_samples,
    )


def _check_decay(optimizer: OptimizerConfig, lengths: RateLengths) -> None:
    """Warm-up, and the decay at the end of WSD, fit into the length of the learning rate."""
    style, warmup, decay = optimizer.lr_decay_style, lengths.warmup, lengths.decay
    steps, unit = "steps" if lengths.unit == "iterations" else "sequences", lengths.unit
    suffix = "iters" if unit == "iterations" else "samples"
    # The other styles have no end: a run may stop within their warm-up, as OpenMoE's recipe may.
    if style in ("linear", "cosine", "WSD") and warmup >= decay:
        expected = f"< {decay}, the {steps} of the {style} decay"
        raise UsageError(f"--lr-warmup-{suffix}", warmup, expected)
    last, longest = lengths.wsd_decay, decay - warmup
    if style == "WSD" and (last is None or last > longest):
        expected = f"<= {longest:g}, the {steps} between warm-up and the end of the decay"
        raise UsageError(f"--lr-wsd-decay-{suffix}", last, expected)


def _check_freezing(config: RunConfig) -> None:
    if config.optimizer.freeze_params or config.optimizer.freeze_router_after is not None:
        # Imported here: it needs torch, which --describe does not.
        from megatron_moe.training.optim.freezing import check_freezing

        check_freezing(config)
