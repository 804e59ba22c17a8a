"""Requests to save and exit early: a signal, the time a run may take, or a file.

All ranks must leave after the same step. One rank may be in step 7 when another already takes step
8, and a rank that left at once would leave the others waiting in a collective. So a rank only notes
a request, and after every step all ranks ask whether any of them has one.

One request reaches a rank several times: Slurm signals every process of a job step, and torchrun,
which is one of them, signals its ranks again. Only a signal that comes much later, while nothing is
being saved, means that the run shall end now.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import psutil

from megatron_moe.checkpoint.manager import host_rank_group
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.platform.signals import SignalThread
from megatron_moe.training.phases import RunSchedule

LOG_FAILURE = "--log-failure-policy stop: a destination of the log cannot be written"
"""The request of `--log-failure-policy stop`."""
REPEAT_SECONDS = 10.0
"""Signals within this time of the first are the same request."""


class ExitRequest:
    """Whether the ranks shall save and exit, the same answer on all of them.

    The handler is installed from construction to `close`, in this process alone.

    Args:
        ranks: the ranks that exit together; over a host group, so that asking does not wait for the
            device.
        number: the signal; `None` listens to none.
        minutes: how long the process may run, from its start; `None` for any time.
        saving: whether a save is in progress, which no signal interrupts.
        file: its existence is a request; `None` for no file.
        log_failed: whether this rank cannot write a destination of its log, which then is one.
    """

    def __init__(
        self,
        ranks: RankGroup,
        number: signal.Signals | None = signal.SIGTERM,
        minutes: float | None = None,
        saving: Callable[[], bool] = lambda: False,
        file: str | None = None,
        log_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._ranks, self._number, self._minutes = ranks, number, minutes
        self._saving, self._file, self._log_failed = saving, file, log_failed
        self._noted = False
        self._first: float | None = None
        self._signals = SignalThread(number, self._arrived, self._note) if number else None

    def agreed(self) -> str:
        """The request of any rank, e.g. `SIGTERM`; empty if there is none.

        The same on all ranks, which call it together.
        """
        late = self._minutes is not None and _minutes_since_start() >= self._minutes
        # One rank looks: a thousand would ask a shared file system after every step.
        exists = self._file is not None and self._ranks.rank == 0 and os.path.exists(self._file)
        noted, late_ranks, seen, failed = self._ranks.all_reduce_sum(
            self._noted, late, exists, self._log_failed()
        )
        if failed:
            return LOG_FAILURE
        if noted and self._number is not None:
            return self._number.name
        if seen:
            return f"--kill-switch-file {self._file}"
        return f"--exit-duration-in-mins {self._minutes:g}" if late_ranks else ""

    def close(self) -> None:
        """Restore the handler from before."""
        if self._signals is not None:
            self._signals.close()

    def _note(self) -> None:
        self._noted = True

    def _arrived(self) -> None:
        """A second request ends a rank that hangs; called in a thread."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if now - self._first > REPEAT_SECONDS and not self._saving() and self._number is not None:
            os._exit(128 + self._number)


def _minutes_since_start() -> float:
    """Minutes since this process started: imports and loading count as well."""
    return (time.time() - psutil.Process().create_time()) / 60


def build_exit_request(
    schedule: RunSchedule,
    ctx: ParallelContext,
    saving: Callable[[], bool],
    log_failed: Callable[[], bool],
) -> ExitRequest | None:
    """The request that the flags ask for, if any; called by all ranks together.

    Args:
        schedule: the run, with its flags.
        ctx: this rank.
        saving: whether a save is in progress on this rank.
        log_failed: whether this rank cannot write a destination of its log.
    """
    train = schedule.config.train
    stops = schedule.config.logging.log_failure_policy == "stop"
    other = (train.exit_duration_in_mins, train.kill_switch_file)
    if not train.exit_signal_handler and other == (None, None) and not stops:
        return None
    number = signal.Signals[f"SIG{train.exit_signal}"] if train.exit_signal_handler else None
    timeout = timedelta(minutes=schedule.config.parallel.distributed_timeout_minutes)
    ranks = host_rank_group(ctx, timeout)
    return ExitRequest(
        ranks,
        number,
        train.exit_duration_in_mins,
        saving,
        train.kill_switch_file,
        log_failed if stops else lambda: False,
    )
