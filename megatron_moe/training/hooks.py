"""What a run does around its steps and evaluations besides training: garbage collection, profiles.

A hook is called on every rank. To add one, derive from `Hook` and name it in `build_hooks`, or
beside it if it needs the process groups.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from megatron_moe.config import LoggingConfig, RunConfig, TrainConfig
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.parallel.failures import FailureMonitor
from megatron_moe.platform import Platform
from megatron_moe.training.memory_history import build_memory_history
from megatron_moe.training.profiling import build_profiler
from megatron_moe.training.step_hook import Hook
from megatron_moe.training.stragglers import StragglerReport
from megatron_moe.training.timing import StepTimers


class ManualCollection(Hook):
    """`--manual-gc`: Python's collector runs only when it is called, on all ranks together.

    Otherwise each rank collects when it has made so many objects, at another moment than the
    others, which then wait for it in the next collective.

    Args:
        train: `manual_gc_interval`, `manual_gc_eval`.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._interval, self._eval = train.manual_gc_interval, train.manual_gc_eval
        self._was_enabled = gc.isenabled()

    def start(self) -> None:
        """Turn the automatic collector off, and collect what the start has left."""
        gc.disable()
        gc.collect()

    def after_step(self, iteration: int) -> None:
        """Collect every `--manual-gc-interval` steps; with 0 never."""
        if self._interval and iteration % self._interval == 0:
            gc.collect()

    def before_evaluation(self) -> None:
        """Collect everything."""
        if self._eval:
            gc.collect()

    def after_evaluation(self) -> None:
        """Collect only what the evaluation has made."""
        if self._eval:
            gc.collect(generation=0)

    def close(self) -> None:
        """Restore the automatic collector."""
        if self._was_enabled:
            gc.enable()


class Progress(Hook):
    """Tells the failure monitor what this rank does, and that it does it.

    Args:
        monitor: of this rank.
    """

    def __init__(self, monitor: FailureMonitor) -> None:
        self._monitor = monitor

    def before_step(self, completed: int) -> None:
        """Begin the next step."""
        self._monitor.beat(f"step {completed + 1}")

    def after_step(self, iteration: int) -> None:
        """Begin what follows a step: reports, saves, the question whether to exit."""
        self._monitor.beat(f"what follows step {iteration}")

    def before_evaluation(self) -> None:
        """Begin an evaluation."""
        self._monitor.beat("an evaluation")

    def after_evaluation(self) -> None:
        """Begin what follows an evaluation."""
        self._monitor.beat("what follows an evaluation")

    def close(self) -> None:
        """The run ends, in its own time."""
        self._monitor.beat("the end of the run", watched=False)


def build_hooks(config: RunConfig, rank: int, platform: Platform) -> list[Hook]:
    """The hooks that the flags name, for this rank.

    Raises:
        UsageError: a profile or a record of memory that this device cannot make.
    """
    hooks: list[Hook] = []
    if config.train.manual_gc:
        hooks.append(ManualCollection(config.train))
    profiler = build_profiler(config.logging, rank, platform)
    if profiler is not None:
        hooks.append(profiler)
    history = build_memory_history(config.logging, rank, platform)
    if history is not None:
        hooks.append(history)
    return hooks


def build_straggler_report(
    logging: LoggingConfig, ctx: ParallelContext, timers: StepTimers, log: Callable[[str], None]
) -> list[Hook]:
    """The report, if `--log-straggler` asks for it."""
    if not logging.log_straggler:
        return []
    ranks = RankGroup(ctx.rank, ctx.world_size, ctx.platform.device)
    return [StragglerReport(logging, ranks, ctx.platform, timers, log)]
