"""A training run that is restarted until it ends, and the faults that happen to it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.disk import empty, fill
from tests.soak.processes import MARK, Process, Role, end_all, processes

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0
"""Seconds that a start may take to end after a fault. Ranks wait 120 for one that is stopped while
they start (`STARTUP_TIMEOUT`), and a busy machine needs more."""
ORPHAN_PATIENCE = 20.0
"""Seconds that processes may outlive the launcher."""
_STEP = re.compile(r" iteration (\d+)/")
_NO_METRICS = "WARNING: --metrics-file"
"""Begins the line of a start that goes on without the file."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that happens once to one start."""

    name: str
    role: Role | None
    """Whose process is signalled; `None`: the disk is filled."""
    number: int = 0
    """The signal."""


DISK = Fault(name="fill the disk", role=None)
FAULTS = (
    Fault(name="KILL a rank", role="rank", number=signal.SIGKILL),
    Fault(name="TERM a rank", role="rank", number=signal.SIGTERM),
    Fault(name="STOP a rank", role="rank", number=signal.SIGSTOP),
    Fault(name="KILL a worker", role="worker", number=signal.SIGKILL),
    Fault(name="STOP a worker", role="worker", number=signal.SIGSTOP),
    Fault(name="KILL the launcher", role="launcher", number=signal.SIGKILL),
    Fault(name="TERM the launcher", role="launcher", number=signal.SIGTERM),
    DISK,
)


@dataclass
class Sample:
    """What the ranks use at one step."""

    step: int
    memory: int
    descriptors: int


@dataclass
class Record:
    """What happened to a run."""

    starts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    repeated_steps: int = 0
    slowest_end: float = 0.0
    """Seconds from a fault to the end of the last process."""
    violations: list[str] = field(default_factory=list)
    without_metrics: set[int] = field(default_factory=set)
    """Steps whose metrics a start left out, as it said, since the disk was full."""
    samples: list[Sample] = field(default_factory=list)


class Supervised:
    """Starts torchrun again and again until the run has taken all its steps.

    Args:
        directory: for checkpoints, metrics and logs.
        argv: of the training program, for a start of each kind (synchronous saves or not).
        faults: that can happen, and the mean number of steps between two; none for a plain run.
        draw: random numbers.
        logs: directory for the logs of the starts.
    """

    def __init__(
        self,
        directory: Path,
        argv: Callable[[random.Random], list[str]],
        faults: tuple[Fault, ...],
        interval: float,
        draw: random.Random,
        logs: Path,
    ) -> None:
        self._directory, self._argv, self._draw, self._logs = directory, argv, draw, logs
        self._faults, self._interval = faults, interval
        self._step = 0
        self._disk = directory.parent
        self.record = Record()

    def run(self, last_step: int, log: Callable[[str], None]) -> Record:
        """Run until ``last_step`` is saved."""
        while self._saved() < last_step:
            before = self._saved()
            self.record.starts += 1
            number = self.record.starts
            code, fault = self._start(number)
            saved = self._saved()
            if saved < before:
                self.record.violations.append(f"start {number}: checkpoint {before} is lost")
            self.record.repeated_steps += max(self._step - saved, 0)
            log(f"start {number}: {before} to {self._step}, saved {saved}: {fault}; code {code}")
            if fault == "none" and code != 0:
                self.record.violations.append(f"start {number}: exit code {code} without a fault")
                if before == saved:  # it would not get further
                    break
        return self.record

    def _saved(self) -> int:
        """Step of the checkpoint that the next start loads; 0 without one."""
        from megatron_moe.checkpoint import latest_step

        try:
            return latest_step(self._directory)
        except Exception:
            return 0

    def _start(self, number: int) -> tuple[int, str]:
        """One start; its exit code and the fault that happened."""
        mark = f"{os.getpid()}-{self._directory.name}-{number}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--shutdown-timeout", "30"]
        log = self._logs / f"{self._directory.name}-{number:03}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [*command, str(ROOT / "pretrain_openmoe.py"), *self._argv(self._draw)],
                env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._step = self._saved()
        reader = threading.Thread(target=self._read, args=(process, mark, log), daemon=True)
        reader.start()
        try:
            code, happened, begin = self._follow(process, mark, number)
        finally:
            process.kill()  # an interrupted soak leaves nothing either
        orphans = end_all(mark, ORPHAN_PATIENCE)
        if orphans:
            self.record.violations.append(f"start {number}: {orphans} orphans after: {happened}")
        if happened:
            self.record.slowest_end = max(self.record.slowest_end, time.monotonic() - begin)
        reader.join(10)
        self.record.faults.update(happened)
        return code, ", ".join(happened) or "none"

    def _follow(
        self, process: subprocess.Popen[str], mark: str, number: int
    ) -> tuple[int, list[str], float]:
        """Disturb a start until it ends; its exit code, what happened, and when the last did."""
        happened: list[str] = []
        begin = time.monotonic()
        while self._faults and process.poll() is None:
            happened += self._disturb(process, mark)
            begin = time.monotonic()
            if happened and happened[-1] != DISK.name:  # a full disk may end nothing
                break
        try:
            return process.wait(PATIENCE if self._faults else None), happened, begin
        except subprocess.TimeoutExpired:
            self.record.violations.append(f"start {number}: hangs after: {happened}")
            process.kill()
            return process.wait(), happened, begin

    def _read(self, process: subprocess.Popen[str], mark: str, log: Path) -> None:
        """Follow the log of a start: its steps, and what the ranks use at some of them."""
        assert process.stdout is not None
        without = False
        with log.with_suffix(".out").open("w") as copy:
            for line in process.stdout:
                copy.write(line)
                copy.flush()
                without = without or _NO_METRICS in line
                if found := _STEP.match(line):
                    self._step = int(found.group(1))
                    if not self._faults and self._step % 50 == 0:
                        self._sample(mark)
                if without:  # the step before the warning may be the one that was not written
                    self.record.without_metrics.add(self._step)

    def _sample(self, mark: str) -> None:
        ranks = [process for process in processes(mark) if process.role == "rank"]
        self.record.samples.append(
            Sample(
                step=self._step,
                memory=sum(rank.memory for rank in ranks),
                descriptors=sum(rank.descriptors for rank in ranks),
            )
        )

    def _disturb(self, process: subprocess.Popen[str], mark: str) -> list[str]:
        """Wait for a random moment, and let a random fault happen; its name, or nothing."""
        fault, limit, deadline = self._draw.choice(self._faults), None, float("inf")
        if self._draw.random() < 0.15:  # in the next seconds, whatever the run does then
            deadline = time.monotonic() + self._draw.uniform(0.0, 20.0)
        else:
            limit = self._step + 1 + int(self._draw.expovariate(1 / self._interval))
        while process.poll() is None and time.monotonic() < deadline:
            if limit is not None and self._step >= limit:
                time.sleep(self._draw.uniform(0.0, 0.3))
                break
            time.sleep(0.02)
        happens = process.poll() is None and self._happens(fault, mark)
        return [fault.name] if happens else []

    def _happens(self, fault: Fault, mark: str) -> bool:
        if fault.role is None:
            fill(self._disk)
            time.sleep(self._draw.uniform(0.5, 3.0))
            empty(self._disk)
            return True
        victims = [process for process in processes(mark) if process.role == fault.role]
        if not victims:
            return False
        return _signal(self._draw.choice(victims), fault.number)


def _signal(process: Process, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
        return True
    return False


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
