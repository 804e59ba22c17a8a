"""Write one checkpoint with all ranks, all of it or nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

from megatron_moe.checkpoint import directory as directories
from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.files import PLAIN_HEAD, free_bytes, stream_of, write_json
from megatron_moe.checkpoint.host_copy import HostCopy
from megatron_moe.checkpoint.index import INDEX
from megatron_moe.checkpoint.rank_files import RankFile, divided, index_of, tensors_of
from megatron_moe.checkpoint.stream import FileRecord, Stream, write_streams
from megatron_moe.errors import CheckpointError
from megatron_moe.model.sharding.parts import Part
from megatron_moe.parallel.collectives import RankGroup

Written = dict[str, FileRecord]
"""Files of a rank by name."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a rank saves: the arguments of `write_checkpoint`."""

    parts: Sequence[Part]
    """Of tensors, in this rank's memory."""
    documents: Mapping[str, Any]
    """File name -> JSON value, written by rank 0."""
    header: Mapping[str, str]
    """Strings for the head of this rank's first file."""


def write_checkpoint(
    directory: str | Path,
    step: int,
    *,
    ranks: RankGroup,
    parts: Sequence[Part],
    documents: Mapping[str, Any],
    header: Mapping[str, str],
) -> Path:
    """Save a step; returns, on every rank, when it is on the disk and the tracker names it.

    Args:
        directory: of the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done.
        ranks: who saves together.
        parts: what this rank writes.
        documents: file name -> JSON value, written by rank 0.
        header: strings for the head of this rank's first file.

    Returns:
        Where the checkpoint is.

    Raises:
        CheckpointError: on every rank, if any failed. What was there before is as it was.
    """
    saving = Saving(Path(directory), step, ranks, bytes_of(parts, ranks))
    try:
        saving.begin()
        files = divided(parts, ranks.rank)
        written = ranks.run_on_all(lambda: saving.write(files, header))
        told = ranks.gather([told_of(written), index_of(files)])
        path = ranks.run_on_all(lambda: "" if told is None else str(saving.commit(told, documents)))
        return Path(ranks.broadcast(path))
    except BaseException:
        saving.give_up()
        raise


def bytes_of(parts: Sequence[Part], ranks: RankGroup) -> int:
    """Bytes of the tensors that all ranks together write."""
    mine = sum(part.values.numel() * part.values.element_size() for part in parts)
    return int(ranks.broadcast(sum(ranks.gather(mine) or [])))


class Saving:
    """One save under way.

    Args:
        directory: of the run's checkpoints.
        step: the step saved.
        ranks: who saves together.
        needed: bytes of tensors in all, for messages.
    """

    def __init__(self, directory: Path, step: int, ranks: RankGroup, needed: int) -> None:
        self.directory, self.step, self.ranks, self.needed = directory, step, ranks, needed
        self.temporary: Path | None = None

    def begin(self) -> None:
        """Rank 0 makes the temporary directory, all learn its name."""

        def make() -> str:
            if self.ranks.rank != 0:
                return ""
            with self.failures():
                return str(directories.begin(self.directory, self.step))

        self.temporary = Path(self.ranks.broadcast(self.ranks.run_on_all(make)))

    def write(self, files: Sequence[RankFile], header: Mapping[str, str]) -> Written:
        """This rank's files, straight from the tensors."""
        return self._write(
            {
                name: stream_of(tensors_of(parts), head)
                for (name, parts), head in zip(files, heads(header, len(files)), strict=True)
            }
        )

    def write_copies(self, copies: Mapping[str, HostCopy], stop: Event) -> Written:
        """This rank's files, from copies; may run in another thread.

        Raises:
            Stopped: ``stop`` was set.
        """
        return self._write({name: copy.parts for name, copy in copies.items()}, stop)

    def _write(self, streams: Mapping[str, Stream], stop: Event | None = None) -> Written:
        assert self.temporary is not None
        with self.failures():
            paths = {self.temporary / name: stream for name, stream in streams.items()}
            records = write_streams(paths, stop)
        return dict(zip(streams, records, strict=True))

    def commit(self, told: Sequence[Any], documents: Mapping[str, Any]) -> Path:
        """Write index, documents and manifest, and make the save count; called by rank 0 alone.

        Args:
            told: of each rank, `told_of` its files and their `index_of`.
            documents: file name -> JSON value.
        """
        assert self.temporary is not None
        files = {name: FileRecord(*known) for records, _ in told for name, known in records.items()}
        shares = (index.from_json(share, INDEX, partial=True) for _, share in told)
        tensors = index.merge(chain.from_iterable(shares))
        with self.failures():
            for name, value in {**documents, INDEX: index.to_json(tensors.values())}.items():
                files[name] = write_json(self.temporary / name, value)
            return directories.commit(self.temporary, self.step, files)

    def give_up(self) -> None:
        """Remove what was written; after a commit there is nothing to remove."""
        if self.ranks.rank == 0 and self.temporary is not None:
            directories.discard(self.temporary)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn a failed write into words: step, directory, bytes needed."""
        try:
            yield
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> CheckpointError:
        what = f"save of step {self.step} to {self.directory}"
        found = error.strerror or str(error)
        if error.errno not in _NO_SPACE:
            return CheckpointError(what, found, "a directory that can be written")
        free = free_bytes(self.directory) if self.directory.exists() else 0
        fix = "make room or choose another --save; the checkpoints that were there are intact"
        return CheckpointError(
            what, f"{found}, {free} bytes free", f"room for {self.needed} bytes of tensors", fix
        )


def heads(header: Mapping[str, str], files: int) -> list[Mapping[str, str]]:
    """Strings for the head of each of a rank's files: the first has what is said once."""
    return [header, *[PLAIN_HEAD] * (files - 1)]


def told_of(written: Written) -> dict[str, list[Any]]:
    """What rank 0 is told of a rank's files."""
    return {name: [record.sha256, record.bytes] for name, record in written.items()}
