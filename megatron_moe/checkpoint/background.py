"""Asynchronous saves: training waits for a copy to host memory, the rest goes on behind it.

A save is in one of two phases. *Writing*: on every rank a thread writes, hashes and syncs the
rank's files from their copy. *Committing*: once all have, a thread of rank 0 writes index and
manifest, renames, and moves the tracker. Threads never communicate: collectives of two threads over
one group could meet in different orders on different ranks. It is the main thread that asks, at
step boundaries (`poll`), whether all ranks have finished a phase: all ranks take the same steps, so
they ask the same number of times, and they learn of a failure at the same step.

Threads and not processes: writing and hashing release the interpreter's lock, a copy laid out as
the file leaves nothing else to do, and forking a process in which communication libraries run
threads is not safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.host_copy import HostCopy, HostMemory
from megatron_moe.checkpoint.rank_files import RankFile, divided, index_of, tensors_of
from megatron_moe.checkpoint.stream import Stopped
from megatron_moe.checkpoint.writer import Contents, Saving, Written, bytes_of, heads, told_of
from megatron_moe.parallel.collectives import RankGroup

_PAUSE = 0.01
"""Seconds between questions when there is nothing to do but wait."""


class _Task:
    """Something that a thread does, and what came of it."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._value: Any = None
        self._error: BaseException | None = None
        # A daemon: a run that ends by an error must not wait for a file that is of no use.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except Stopped:
            pass
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return not self.running and self._error is not None

    def result(self) -> Any:
        """What it returned, once it has ended.

        Raises:
            Exception: what it raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


@dataclass
class _Flight:
    """A save under way."""

    saving: Saving
    contents: Contents
    shares: list[Any] | None
    """On rank 0, every rank's part of the index."""
    task: _Task
    stop: threading.Event
    afterwards: Callable[[], None]
    committing: bool = False


class BackgroundSaves:
    """Saves of one run, at most one of them under way; all ranks call each method together.

    Args:
        ranks: who saves together; with more than one, over a group on the host that nothing but
            this uses, so that a question never waits for a device.
        pinned: whether copies come from a GPU.
    """

    def __init__(self, ranks: RankGroup, pinned: bool = False) -> None:
        self._ranks = ranks
        self._memory = HostMemory(pinned)
        self._flight: _Flight | None = None

    @property
    def step(self) -> int | None:
        """The step that is being saved, if any."""
        return None if self._flight is None else self._flight.saving.step

    def start(
        self,
        directory: str | Path,
        step: int,
        contents: Contents,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to save; what ``contents`` refers to may change when this returns.

        Args:
            directory: of the run's checkpoints, shared by all ranks.
            step: optimizer steps done.
            contents: what this rank saves.
            afterwards: called in a thread of rank 0 when the tracker names the step.

        Raises:
            CheckpointError: on every rank, if the save cannot begin.
        """
        if self._flight is not None:
            raise RuntimeError(f"step {self.step} is still being saved; finish it first")
        ranks, parts = self._ranks, contents.parts
        saving = Saving(Path(directory), step, ranks, bytes_of(parts, ranks))
        try:
            saving.begin()
            files = divided(parts, ranks.rank)
            copies = ranks.run_on_all(lambda: self._copies(files, contents.header))
            shares = ranks.gather(index_of(files))
        except BaseException:
            saving.give_up()
            raise
        stop = threading.Event()
        task = _Task(lambda: saving.write_copies(copies, stop))
        self._flight = _Flight(saving, contents, shares, task, stop, afterwards)

    def poll(self) -> Path | None:
        """See how far it is; cheap, to be called after every step.

        Returns:
            Where the checkpoint is, once; None as long as it is not complete, or if none is under
            way.

        Raises:
            CheckpointError: on every rank, if it failed on any. The tracker is as it was.
        """
        flight = self._flight
        if flight is None:
            return None
        running, failed = self._ranks.all_reduce_sum(flight.task.running, flight.task.failed)
        if running and not failed:
            return None
        try:
            if failed:
                flight.stop.set()
            result = self._ranks.run_on_all(flight.task.result)
            if not flight.committing:
                self._commit(flight, result)
                return None
            self._flight = None
            return Path(self._ranks.broadcast(result))
        except BaseException:
            self._flight = None
            flight.saving.give_up()
            raise

    def finish(self) -> Path | None:
        """Wait until the save under way, if any, is complete; returns and raises as `poll`."""
        while self._flight is not None:
            found = self.poll()
            if found is not None:
                return found
            time.sleep(_PAUSE)
        return None

    def abandon(self) -> None:
        """Let go of the save under way on this rank alone, as when the run ends by an error."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.stop.set()

    def _copies(self, files: Sequence[RankFile], header: Mapping[str, str]) -> dict[str, HostCopy]:
        """Of each file of this rank."""
        tensors = [tensors_of(parts) for _, parts in files]
        copies = self._memory.copy(list(zip(tensors, heads(header, len(files)), strict=True)))
        return dict(zip((name for name, _ in files), copies, strict=True))

    def _commit(self, flight: _Flight, written: Written) -> None:
        """All files are written: let rank 0 make them count."""
        told = self._ranks.gather(told_of(written))
        shares, saving = flight.shares, flight.saving

        def commit() -> str:
            if told is None or shares is None:
                return ""
            path = saving.commit(list(zip(told, shares, strict=True)), flight.contents.documents)
            flight.afterwards()
            return str(path)

        flight.committing, flight.task = True, _Task(commit)
