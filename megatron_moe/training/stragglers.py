"""Which ranks slow the others down (`--log-straggler`).

All ranks leave a step together, so that times of steps, and of anything with a collective inside,
are the same on a slow rank and on those that wait for it. Measured is what waits for no rank: a
matrix product of fixed size on the device, and the time in which this rank waited for its data.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from megatron_moe.config import LoggingConfig
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.waiting import ranks_text
from megatron_moe.platform import Platform
from megatron_moe.platform.device import gemm_tflops
from megatron_moe.training.step_hook import Hook
from megatron_moe.training.timing import StepTimers


class StragglerReport(Hook):
    """A line at every `--log-interval`.

    Args:
        logging: the interval, and how many ranks are named.
        ranks: all ranks of the run.
        platform: this rank's device.
        timers: of the run, which measure the time of data.
        log: prints a line, on one rank.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        ranks: RankGroup,
        platform: Platform,
        timers: StepTimers,
        log: Callable[[str], None],
    ) -> None:
        self._interval, self._count = logging.log_interval, logging.straggler_minmax_count
        self._ranks, self._platform = ranks, platform
        self._timers, self._log = timers, log
        self._last: int | None = None

    def before_step(self, completed: int) -> None:
        """Begin to count with the first step."""
        if self._last is None:
            self._last, self._timers.data_seconds = completed, 0.0

    def after_step(self, iteration: int) -> None:
        """Measure and report; called by all ranks together."""
        if iteration % self._interval or self._last is None:
            return
        waited = self._timers.data_seconds / (iteration - self._last)
        mine = [gemm_tflops(self._platform.device), waited]
        self._last, self._timers.data_seconds = iteration, 0.0
        gathered = self._ranks.gather(mine)
        if gathered is not None:
            speeds, data = (dict(enumerate(column)) for column in zip(*gathered, strict=True))
            self._log(straggler_line(iteration, speeds, data, self._count))


def straggler_line(
    iteration: int, speeds: Mapping[int, float], data: Mapping[int, float], count: int
) -> str:
    """The slowest and the fastest ranks.

    Args:
        iteration: steps done.
        speeds: TFLOP/s of the matrix product by rank.
        data: seconds of a step that each rank waited for data.
        count: ranks to name of each kind.
    """
    ordered = sorted(speeds, key=lambda rank: speeds[rank])
    slowest, fastest = ordered[:count], ordered[: -count - 1 : -1]
    waits = sorted(data, key=lambda rank: -data[rank])[:count]

    def named(ranks: list[int], values: Mapping[int, float], scale: float, unit: str) -> str:
        return ", ".join(f"{ranks_text([r])} {values[r] * scale:.4g} {unit}" for r in ranks)

    return (
        f" stragglers at iteration {iteration}"
        f" | matrix product: median {statistics.median(speeds.values()):.4g} TFLOP/s,"
        f" slowest {named(slowest, speeds, 1.0, 'TFLOP/s')},"
        f" fastest {named(fastest, speeds, 1.0, 'TFLOP/s')}"
        f" | data: median {statistics.median(data.values()) * 1e3:.4g} ms,"
        f" slowest {named(waits, data, 1e3, 'ms')}"
    )
