"""Write one checkpoint with all ranks, all of it or nothing."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint import directory as directories
from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.errors import CheckpointError
from megatron_moe.checkpoint.files import (
    DTYPES,
    FileRecord,
    free_bytes,
    write_json,
    write_tensors,
)
from megatron_moe.checkpoint.index import INDEX, LogicalTensor, block_key
from megatron_moe.checkpoint.parts import Part
from megatron_moe.checkpoint.ranks import Ranks

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def rank_file(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_checkpoint(
    directory: str | Path,
    step: int,
    *,
    ranks: Ranks,
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
        header: strings for the head of this rank's file.

    Returns:
        Where the checkpoint is.

    Raises:
        CheckpointError: on every rank, if any failed. What was there before is as it was.
    """
    needed = sum(part.values.numel() * part.values.element_size() for part in parts)
    needed = ranks.broadcast(sum(ranks.gather(needed) or []))
    saving = _Saving(Path(directory), step, ranks, needed)
    try:
        saving.begin()
        written = ranks.together(lambda: saving.write(parts, header))
        told = ranks.gather([written.sha256, written.bytes, _index_of(parts, ranks.rank)])
        return saving.finish(told, documents)
    except BaseException:
        saving.give_up()
        raise


class _Saving:
    """One save under way."""

    def __init__(self, directory: Path, step: int, ranks: Ranks, needed: int) -> None:
        self.directory, self.step, self.ranks, self.needed = directory, step, ranks, needed
        self.temporary: Path | None = None

    def begin(self) -> None:
        """Rank 0 makes the temporary directory, all learn its name."""

        def make() -> str:
            try:
                return str(directories.begin(self.directory, self.step))
            except OSError as error:
                raise self.failure(error) from error

        made = self.ranks.together(lambda: make() if self.ranks.rank == 0 else "")
        self.temporary = Path(self.ranks.broadcast(made))

    def write(self, parts: Sequence[Part], header: Mapping[str, str]) -> FileRecord:
        """This rank's file."""
        assert self.temporary is not None
        tensors = [(block_key(p.kind, p.name, p.block.offsets), p.values) for p in parts]
        try:
            return write_tensors(self.temporary / rank_file(self.ranks.rank), tensors, header)
        except OSError as error:
            raise self.failure(error) from error

    def finish(self, told: list[Any] | None, documents: Mapping[str, Any]) -> Path:
        """Rank 0 writes index, documents and manifest, and makes the save count."""

        def commit() -> str:
            assert told is not None and self.temporary is not None
            files = {rank_file(r): FileRecord(*record[:2]) for r, record in enumerate(told)}
            shares = (index.from_json(share, INDEX, partial=True) for *_, share in told)
            tensors = index.merge(chain.from_iterable(shares))
            try:
                for name, value in {**documents, INDEX: index.to_json(tensors.values())}.items():
                    files[name] = write_json(self.temporary / name, value)
                return str(directories.commit(self.temporary, self.step, files))
            except OSError as error:
                raise self.failure(error) from error

        return Path(
            self.ranks.broadcast(self.ranks.together(lambda: commit() if told is not None else ""))
        )

    def give_up(self) -> None:
        """Remove what was written; after a commit there is nothing to remove."""
        if self.ranks.rank == 0 and self.temporary is not None:
            directories.discard(self.temporary)

    def failure(self, error: OSError) -> CheckpointError:
        """A failed write in words: step, directory, bytes needed."""
        what = f"save of step {self.step} to {self.directory}"
        found = error.strerror or str(error)
        if error.errno not in _NO_SPACE:
            return CheckpointError(what, found, "a directory that can be written")
        free = free_bytes(self.directory) if self.directory.exists() else 0
        fix = "make room or choose another --save; the checkpoints that were there are intact"
        return CheckpointError(
            what, f"{found}, {free} bytes free", f"room for {self.needed} bytes of tensors", fix
        )


def _index_of(parts: Sequence[Part], rank: int) -> dict[str, Any]:
    """The index of one rank's file."""
    grouped: dict[index.Name, LogicalTensor] = {}
    for part in parts:
        known = grouped.get((part.kind, part.name))
        blocks = (*(known.blocks if known else ()), (rank_file(rank), part.block))
        dtype = DTYPES[part.values.dtype]
        grouped[part.kind, part.name] = LogicalTensor(
            part.kind, part.name, part.shape, dtype, part.block.view, blocks
        )
    return index.to_json(grouped.values())
