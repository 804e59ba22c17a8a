"""Where the time of a step goes: Megatron-Core's timers, with its names, over all ranks.

`--timing-log-level 0` measures nothing. Level 1 measures what happens once in a step, level 2 also
what happens for each micro-batch. Every measurement waits for the device, and those of level 1 for
the other ranks as well, so that a level above 0 makes steps slower.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.timers import Timers
from torch import nn

from megatron_moe.moe import MoELayer
from megatron_moe.moe.exchange import ExchangeClock
from megatron_moe.parallel.schedule import megatron_config
from megatron_moe.training.optim.build import chained_optimizers

NAMES: dict[str, int] = {
    "batch-generator": 2,
    "forward-backward": 1,
    "forward-compute": 2,
    "backward-compute": 2,
    "all-to-all": 2,
    "forward-recv": 2,
    "forward-send": 2,
    "backward-recv": 2,
    "backward-send": 2,
    "forward-send-forward-recv": 2,
    "forward-send-backward-recv": 2,
    "backward-send-forward-recv": 2,
    "backward-send-backward-recv": 2,
    "forward-backward-send-forward-backward-recv": 2,
    "all-grads-sync": 1,
    "non-tensor-parallel-grads-all-reduce": 1,
    "embedding-grads-all-reduce": 1,
    "params-all-gather": 1,
    "optimizer-copy-to-main-grad": 1,
    "optimizer-unscale-and-check-inf": 1,
    "optimizer-clip-main-grad": 1,
    "optimizer-count-zeros": 1,
    "optimizer-inner-step": 1,
    "optimizer-copy-main-to-model-params": 1,
    "optimizer": 1,
    "save-checkpoint": 1,
}
"""Timers of Megatron-LM's training log and their levels, in the order of a step. `all-to-all`, of
the expert layers forward and backward, is this program's; it is a part of the two before it."""
BETWEEN_STEPS = {"save-checkpoint"}
"""What is not a part of a step: the time since the last collection, however many steps it has."""


class StepTimers:
    """Measures the parts of steps.

    Args:
        level: `--timing-log-level`.
    """

    def __init__(self, level: int) -> None:
        self._names = [name for name, its_level in NAMES.items() if its_level <= level]
        self._timers = Timers(level, "minmax") if level else None
        self._configs: list[Any] = []
        self._clocks: list[ExchangeClock] = []
        self.data_seconds = 0.0
        """That this rank has waited for its data, at any level; `StragglerReport` sets it to 0."""
        if self._timers is not None:
            for name in self._names:
                self._timers(name, log_level=NAMES[name])

    def attach(self, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> None:
        """Let Megatron-Core's schedules and optimizer measure themselves."""
        if self._timers is None:
            return
        parts = [part.config for part in chained_optimizers(optimizer)]
        self._configs = [*(megatron_config(chunk) for chunk in chunks), *parts]
        modules = [module for chunk in chunks for module in chunk.modules()]
        self._clocks = [module.groups.clock for module in modules if isinstance(module, MoELayer)]
        self._set(self._timers)

    @contextlib.contextmanager
    def measure_data(self) -> Iterator[None]:
        """Measure `batch-generator`, and on the host's clock `data_seconds`."""
        with self.measure("batch-generator"):
            start = time.perf_counter()
            yield
            self.data_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure a block. Of level 1 it begins on all ranks together."""
        if self._timers is None:
            yield
            return
        timer = self._timers(name, log_level=NAMES[name])
        timer.start(barrier=NAMES[name] == 1)
        try:
            yield
        finally:
            timer.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing that Megatron-Core does, e.g. in an evaluation."""
        self._set(None)
        try:
            yield
        finally:
            self._set(self._timers)

    def collect(self, steps: int) -> Mapping[str, tuple[float, float]]:
        """Seconds of a step since the last call, by name: least and most over the ranks that
        measured it. `BETWEEN_STEPS` are seconds since the last call. A collective over all ranks,
        unless the level is 0.
        """
        if self._timers is None:
            return {}
        mine = torch.tensor(
            [self._timers(name).elapsed(reset=True) for name in self._names],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        ranks = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(ranks, mine)
        found: dict[str, tuple[float, float]] = {}
        for name, seconds in zip(self._names, torch.stack(ranks, 1).tolist(), strict=True):
            count = 1 if name in BETWEEN_STEPS else steps
            measured = [value / count for value in seconds if value > 0.0]
            if measured:
                found[name] = (min(measured), max(measured))
        return found

    def _set(self, timers: Timers | None) -> None:
        for config in self._configs:
            config.timers = timers
        measured = timers is not None and "all-to-all" in self._names
        for clock in self._clocks:
            clock.measure = self._exchange if measured else contextlib.nullcontext

    def _exchange(self) -> contextlib.AbstractContextManager[None]:
        return self.measure("all-to-all")
