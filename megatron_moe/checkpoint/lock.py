"""One writer for each directory of checkpoints: a lock file that names the run that holds it.

    DIR/.lock    JSON: user, host, process, start, job; its modification time is the heartbeat

Two runs that save to one directory would delete each other's unfinished saves and mix their steps.
Rank 0 of a run creates the file, which is atomic on every file system that nodes share, renews its
modification time every 10 seconds, and deletes it at its end. A run that finds a lock decides
whether the owner is dead:

    owner                                                       dead
    on this host, in this process namespace                     if there is no such process
    an earlier start of this job: same `SLURM_JOB_ID` and       always: Slurm and torchrun end all
    fewer restarts, or the same run of torchrun                 processes before they start again
    anywhere else                                               if the heartbeat stops for 120 s

The lock of a dead owner is taken over, at once or after the 120 seconds. A living owner is an
error. An owner that only seemed dead, e.g. a suspended machine, finds another name in the file
before it deletes or commits anything (`WriterLock.check`), and ends.

Kernel locks (`flock`) end with their process, but are missing or local to a node on some shared
file systems. Heartbeats are compared with the file system's own clock and with the time that passes
here, never with another machine's clock. Cost: one change of a modification time every 10 seconds
for each run, and two reads of the file for each save, all by rank 0.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.owner import Owner
from megatron_moe.errors import CheckpointError

NAME = ".lock"


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    heartbeat: float = 10.0
    """Between two renewals."""
    lease: float = 120.0
    """Without a renewal, after which an owner elsewhere is dead."""
    grace: float = 5.0
    """For which a living owner is waited for: it may be ending."""
    poll: float = 0.5
    """Between two looks at a lock."""


_Found = tuple[Owner | None, int]
"""What a lock says: its owner, if it is written completely, and the last heartbeat."""


class _Watched:
    """The heartbeats of one owner, as another process sees them.

    Args:
        found: what the lock said first.
        since: when the last heartbeat was, by this process' clock.
    """

    def __init__(self, found: _Found, since: float) -> None:
        self._owner, self._beat = found
        self._since, self._renewed = since, False

    def is_of(self, found: _Found) -> bool:
        """Whether the lock still names the same owner."""
        return found[0] == self._owner

    def look(self, found: _Found, here: Owner) -> bool | None:
        """Whether the owner lives; `None` if that is not known yet."""
        if found[1] != self._beat:
            self._beat, self._since, self._renewed = found[1], time.monotonic(), True
        alive = self._owner.is_alive(here) if self._owner is not None else None
        return True if alive is None and self._renewed else alive

    def silence(self) -> float:
        """Seconds since the last heartbeat."""
        return time.monotonic() - self._since


class WriterLock:
    """The lock of one directory; held from `acquire` to `release`, by one process.

    Args:
        directory: of a run's checkpoints, on a file system that all nodes share.
        timing: see `Timing`.
    """

    def __init__(self, directory: str | Path, timing: Timing | None = None) -> None:
        self._directory, self._timing = Path(directory), timing or Timing()
        self._path = self._directory / NAME
        self._here = Owner.of_this_process()
        self._created: list[Path] = []
        self._handle: int | None = None
        self._swap, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, log: Callable[[str], None] = lambda line: None) -> None:
        """Create the directory and its lock, or take the lock over from a dead owner.

        Args:
            log: prints a line while this waits to see whether an owner elsewhere lives.

        Raises:
            CheckpointError: another run writes there.
            OSError: the lock cannot be written.
        """
        missing = [p for p in (self._directory, *self._directory.parents) if not p.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._created = missing
        try:
            self._handle = self._create(self._path)
            if self._handle is None:
                self._handle = self._wait(log)
        except BaseException:
            self._remove_created()
            raise
        self._thread = threading.Thread(target=self._renew, name="save-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this run still is the only writer, before it deletes or commits anything.

        Raises:
            CheckpointError: another run has taken the lock over, or this one has released it.
        """
        found = self._read()
        if found is None and self._handle is not None:
            # Somebody deleted it, perhaps with the directory. Only one run can create it again.
            self._directory.mkdir(parents=True, exist_ok=True)
            handle = self._create(self._path)
            if handle is not None:
                with self._swap:
                    os.close(self._handle)
                    self._handle = handle
                return
            found = self._read()
        owner = found[0] if found is not None else None
        if self._handle is None or owner is None or owner.key != self._here.key:
            fix = f"it gave no sign of life for {self._timing.lease:g} s, and another run took over"
            what, expected = f"writer of --save {self._directory}", "this run"
            raise CheckpointError(what, str(owner or "nobody"), expected, fix)

    def release(self) -> None:
        """Delete the lock, and directories that were created for it and are still empty."""
        if self._handle is None or os.getpid() != self._here.pid:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and found[0] is not None and found[0].key == self._here.key:
                self._path.unlink()
        os.close(self._handle)
        self._handle = None
        self._remove_created()

    def _remove_created(self) -> None:
        with contextlib.suppress(OSError):
            for path in self._created:
                path.rmdir()

    def _wait(self, log: Callable[[str], None]) -> int:
        """Wait until the owner is dead, and take its lock over; the open file."""
        start, logged = time.monotonic(), False
        watched: _Watched | None = None
        while True:
            handle = self._create(self._path)
            if handle is not None:
                return handle
            found = self._read()
            if found is None:
                continue
            if watched is None or not watched.is_of(found):
                silent = (self._file_system_time() - found[1]) / 1e9
                watched = _Watched(found, time.monotonic() - max(0.0, silent))
            alive = watched.look(found, self._here)
            if alive is False or (not alive and watched.silence() >= self._timing.lease):
                handle = self._take_over(found)
                if handle is not None:
                    return handle
            elif alive and time.monotonic() - start >= self._timing.grace:
                raise self._held(found[0])
            elif alive is None and not logged:
                logged = True
                log(f" waiting up to {self._timing.lease:g} s for a sign of life of {found[0]}")
            time.sleep(self._timing.poll)

    def _held(self, owner: Owner | None) -> CheckpointError:
        expected, fix = "a directory that no other run writes to", "end that run or use another"
        found = f"{self._directory}, written by {owner}"
        return CheckpointError("--save", found, expected, fix)

    def _take_over(self, found: _Found) -> int | None:
        """Replace the lock of a dead owner by one of this process; the open file.

        `None` if another run does so, or the lock has changed.
        """
        guard, mine = (
            self._path.with_name(f"{NAME}.{part}") for part in ("taking", self._here.key)
        )
        # Without the guard, a run that is a moment later would replace the lock of the new owner.
        handle = self._create(guard)
        if handle is None:
            with contextlib.suppress(FileNotFoundError):
                if self._file_system_time() - guard.stat().st_mtime_ns > self._timing.lease * 1e9:
                    guard.unlink()  # its run was killed between these lines
            return None
        os.close(handle)
        try:
            if self._read() != found:
                return None
            handle = self._create(mine)
            mine.replace(self._path)
            return handle
        finally:
            guard.unlink(missing_ok=True)

    def _create(self, path: Path) -> int | None:
        """Create a file that names this process; its handle, or `None` if there is one."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        try:
            os.write(handle, self._here.to_json())
            os.fsync(handle)
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        return handle

    def _read(self) -> _Found | None:
        """Owner and last heartbeat, by the file system's clock in nanoseconds; `None`: no lock."""
        try:
            # Opening it makes NFS ask the server instead of using cached attributes.
            with self._path.open("rb") as file:
                return Owner.from_json(file.read(1 << 16)), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _file_system_time(self) -> int:
        """Nanoseconds: the modification time of a new file."""
        probe = self._path.with_name(f"{NAME}.time-{self._here.key}")
        try:
            with probe.open("wb") as file:
                file.write(b".")
                file.flush()
                return os.fstat(file.fileno()).st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._timing.heartbeat):
            # Of the open file: that of a run that took over has its own heartbeat.
            with contextlib.suppress(OSError), self._swap:
                if self._handle is not None:
                    os.utime(self._handle)
