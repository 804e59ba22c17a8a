"""One save, all or nothing, in the caller's thread or while training continues.

    start_save   every rank   temporary directory; blocks assigned to files; copied, if asynchronous
    writing      every rank   its files: written, hashed, synced
    committing   rank 0       index and JSON files, manifest, rename, tracker

A synchronous save is the start and the finish of an asynchronous one, without the copy: its phases
write from the tensors themselves and run in the caller's thread. In an asynchronous save each phase
is a thread, and training waits only until the tensors are copied to host memory.

Threads never communicate: two threads that use collectives over one group could do so in different
orders on different ranks. The main threads ask at step boundaries (`PendingSave.poll`) whether all
ranks have ended a phase. All ranks take the same steps, so they ask equally often, and all see a
failure at the same step.

Threads and not processes: writing and hashing release the interpreter's lock, the copy already has
the layout of the files, and forking a process in which communication libraries run threads is not
safe.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint import directory as directories
from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.contents import (
    SaveContents,
    assign_to_files,
    file_streams,
    rank_index,
)
from megatron_moe.checkpoint.disk import (
    FileRecord,
    Stopped,
    Stream,
    free_bytes,
    write_bytes,
    write_json,
    write_streams,
)
from megatron_moe.checkpoint.index import INDEX
from megatron_moe.checkpoint.tensor_files import HostMemory
from megatron_moe.errors import CheckpointError
from megatron_moe.parallel.collectives import RankGroup

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PAUSE = 0.01
"""Seconds between polls while `finish` waits."""


def start_save(
    directory: str | Path,
    step: int,
    contents: SaveContents,
    ranks: RankGroup,
    *,
    memory: HostMemory | None = None,
    on_commit: Callable[[], None] = lambda: None,
    check_writer: Callable[[], None] = lambda: None,
) -> PendingSave:
    """Start to save a step; called by all ranks together.

    Args:
        directory: of the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done.
        contents: what this rank saves.
        ranks: the ranks that save together.
        memory: for an asynchronous save: the tensors are copied there, and may change once this
            returns. Without it they must not change before `PendingSave.finish` returns.
        on_commit: called on rank 0 once the tracker names the step, in the thread that commits.
        check_writer: called on rank 0 before anything is deleted or committed; raises if another
            run has taken the directory over, see `WriterLock.check`.

    Raises:
        CheckpointError: on every rank, if any failed. Nothing of the save is left.
        RuntimeError: ``memory`` is in use by a save in progress.
    """
    if memory is not None and memory.step is not None:
        raise RuntimeError(f"step {memory.step} is still being saved; finish it first")
    needed = _total_bytes(contents, ranks)
    transaction = SaveTransaction(Path(directory), step, ranks, needed, check_writer)
    try:
        transaction.begin()
        files = assign_to_files(contents.parts, ranks.rank)
        streams, mine = ranks.run_on_all(
            lambda: (file_streams(files, contents.header, memory), rank_index(files))
        )
        indexes = ranks.gather(mine)
    except BaseException:
        transaction.roll_back()
        raise
    return PendingSave(
        transaction, streams, indexes, contents.other_files, memory=memory, on_commit=on_commit
    )


def _total_bytes(contents: SaveContents, ranks: RankGroup) -> int:
    """Bytes of the tensors that all ranks write."""
    return int(ranks.broadcast(sum(ranks.gather(contents.bytes) or [])))


class SaveTransaction:
    """The files of one save: written to a temporary directory, then committed or rolled back.

    Args:
        directory: of the run's checkpoints.
        step: the step saved.
        ranks: the ranks that save together.
        needed: bytes of all ranks' tensors, for messages.
        check_writer: see `start_save`.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        ranks: RankGroup,
        needed: int,
        check_writer: Callable[[], None],
    ) -> None:
        self.directory, self.step, self.ranks, self.needed = directory, step, ranks, needed
        self._check_writer = check_writer
        self._temporary: Path | None = None

    def begin(self) -> None:
        """Rank 0 creates the temporary directory and broadcasts its name.

        Raises:
            CheckpointError: on every rank: it cannot be created.
        """

        def make() -> str:
            if self.ranks.rank != 0:
                return ""
            with self._failures():
                self._check_writer()
                return str(directories.begin(self.directory, self.step))

        self._temporary = Path(self.ranks.broadcast(self.ranks.run_on_all(make)))

    def write(self, streams: Mapping[str, Stream], stop: threading.Event) -> dict[str, FileRecord]:
        """Write this rank's files; local to the rank, in any thread.

        Raises:
            CheckpointError: a file could not be written.
            Stopped: ``stop`` was set.
        """
        assert self._temporary is not None
        with self._failures():
            paths = {self._temporary / name: stream for name, stream in streams.items()}
            records = write_streams(paths, stop)
        return dict(zip(streams, records, strict=True))

    def commit(
        self, records: Sequence[Any], indexes: Sequence[Any], other_files: Mapping[str, Any]
    ) -> Path:
        """Write index, JSON files and manifest, and commit; on rank 0 alone, in any thread.

        Args:
            records: for each rank, file name -> [SHA-256, bytes].
            indexes: for each rank, the index of its files.
            other_files: file name -> JSON value, or the bytes of the file.

        Raises:
            CheckpointError: ranks did not write each element exactly once, or a write failed.
        """
        assert self._temporary is not None
        files = {name: FileRecord(*entry) for rank in records for name, entry in rank.items()}
        parts = (index.from_json(share, INDEX, partial=True) for share in indexes)
        tensors = index.merge(chain.from_iterable(parts))
        with self._failures():
            index_file = {INDEX: index.to_json(tensors.values())}
            for name, value in {**other_files, **index_file}.items():
                write = write_bytes if isinstance(value, bytes) else write_json
                files[name] = write(self._temporary / name, value)
            self._check_writer()
            return directories.commit(self._temporary, self.step, files)

    def roll_back(self) -> None:
        """Remove the temporary directory; after a commit there is none."""
        if self.ranks.rank == 0 and self._temporary is not None:
            directories.discard(self._temporary)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn an OSError into an error with step, directory and bytes needed."""
        try:
            yield
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> CheckpointError:
        save, found = f"save of step {self.step} to {self.directory}", error.strerror or str(error)
        if error.errno not in _NO_SPACE:
            return CheckpointError(f"target of the {save}", found, "a writable directory")
        free = free_bytes(self.directory) if self.directory.exists() else 0
        return CheckpointError(
            f"space for the {save}",
            f"{found}, {free} bytes free",
            f"enough for {self.needed} bytes of tensors",
            "free some or choose another --save; existing checkpoints are intact",
        )


class _Phase:
    """One phase of a save on this rank, run by a thread of its own or by the caller of `result`."""

    def __init__(self, action: Callable[[], Any], in_thread: bool) -> None:
        self._action = action
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if in_thread:
            # A daemon: a run that ends by an error does not wait for files that will not count.
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except Stopped:
            pass
        except BaseException as error:  # raised again by `result`
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return not self.running and self._error is not None

    def result(self) -> Any:
        """The action's value, or the exception that it raised."""
        if self._thread is None:
            return self._action()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


class PendingSave:
    """A save in progress, from `start_save`; all ranks call `poll` and `finish` together.

    Args:
        transaction: its files.
        streams: the bytes of this rank's files.
        indexes: on rank 0, the index of each rank's files; None on other ranks.
        other_files: file name -> JSON value, or the bytes of the file.
        memory: the copy that ``streams`` read, in an asynchronous save.
        on_commit: called on rank 0 after the commit.
    """

    def __init__(
        self,
        transaction: SaveTransaction,
        streams: Mapping[str, Stream],
        indexes: list[Any] | None,
        other_files: Mapping[str, Any],
        *,
        memory: HostMemory | None,
        on_commit: Callable[[], None],
    ) -> None:
        self._transaction, self._ranks = transaction, transaction.ranks
        self._indexes, self._other_files = indexes, other_files
        self._memory, self._on_commit = memory, on_commit
        self._stop = threading.Event()
        self._committing = False
        self.done = False
        """Whether it is complete or has failed."""
        if memory is not None:
            memory.step = transaction.step
        self._phase = self._start(lambda: transaction.write(streams, self._stop))

    @property
    def step(self) -> int:
        """The step that is being saved."""
        return self._transaction.step

    def poll(self) -> Path | None:
        """Advance the save if all ranks have ended a phase; cheap, to be called after every step.

        Returns:
            The checkpoint's directory once it is complete and the tracker names it; else None.

        Raises:
            CheckpointError: on every rank, if any failed. The tracker is unchanged.
        """
        if not self._phase_ended():
            return None
        try:
            result = self._ranks.run_on_all(self._phase.result)
            if not self._committing:
                self._start_commit(result)
                return None
            path = Path(self._ranks.broadcast(result))
        except BaseException:
            self._transaction.roll_back()
            self._end()
            raise
        self._end()
        return path

    def finish(self) -> Path:
        """Wait until the save is complete; returns and raises as `poll`."""
        while (path := self.poll()) is None:
            if self._memory is not None:
                time.sleep(_PAUSE)
        return path

    def abandon(self) -> None:
        """Stop writing, on this rank alone, because the run ends by an error."""
        self._stop.set()

    def _start(self, action: Callable[[], Any]) -> _Phase:
        return _Phase(action, in_thread=self._memory is not None)

    def _phase_ended(self) -> bool:
        """Whether the phase has ended on all ranks, or failed on any; then the others stop."""
        if self._memory is None:
            return True
        running, failed = self._ranks.all_reduce_sum(self._phase.running, self._phase.failed)
        if failed:
            self._stop.set()
        return bool(failed) or not running

    def _start_commit(self, written: dict[str, FileRecord]) -> None:
        """All ranks have written their files: rank 0 commits them."""
        mine = {name: [record.sha256, record.bytes] for name, record in written.items()}
        records = self._ranks.gather(mine)

        def commit() -> str:
            if records is None or self._indexes is None:
                return ""
            path = self._transaction.commit(records, self._indexes, self._other_files)
            self._on_commit()
            return str(path)

        self._committing, self._phase = True, self._start(commit)

    def _end(self) -> None:
        self.done = True
        if self._memory is not None:
            self._memory.step = None
