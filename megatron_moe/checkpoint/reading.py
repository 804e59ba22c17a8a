"""Read tensors of a checkpoint: any block of any logical tensor, by a rank or without ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint.directory import step_directory, verify_files
from megatron_moe.checkpoint.index import LogicalTensor, Name, block_key
from megatron_moe.checkpoint.metadata import RunIdentity, open_checkpoint
from megatron_moe.checkpoint.tensor_files import TORCH_DTYPES, TensorFiles
from megatron_moe.config import RunConfig
from megatron_moe.errors import CheckpointError, Corrupt, UsageError
from megatron_moe.model.sharding.blocks import MODEL, Block, copy_overlap


class TensorReader:
    """Reads any block of any logical tensor, from only those files that hold some of it.

    Args:
        directory: of one step.
        tensors: its index.
    """

    def __init__(self, directory: Path, tensors: dict[Name, LogicalTensor]) -> None:
        self.tensors = tensors
        self._files = TensorFiles(directory)

    def fill(self, kind: str, name: str, block: Block, out: Tensor) -> None:
        """Read one block into ``out``, which is shaped ``block.sizes`` and has the saved dtype.

        Raises:
            CheckpointError: the saved view and the block's have no common refinement.
            Corrupt: a file does not match the index.
        """
        tensor = self.tensors[kind, name]
        copied = 0
        for file, stored in tensor.blocks:
            # With equal views the overlap is known without opening the file.
            if stored.view == block.view and stored.intersection(block) is None:
                continue
            key = block_key(kind, name, stored.offsets)
            values = self._files.tensor(file, key, tensor.dtype, stored.sizes)
            try:
                copied += copy_overlap(stored, values, block, out)
            except ValueError as error:
                what, expected = f"shape of {name}", "compatible with the checkpoint's"
                raise CheckpointError(what, str(error), expected) from None
        if copied != block.numel:
            expected = f"{block.numel} elements"
            raise Corrupt(f"block of {name} ({kind})", f"{copied} elements", expected)

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole logical tensor, on the CPU."""
        tensor = self.tensors[kind, name]
        out = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
        self.fill(kind, name, Block.whole(tensor.view), out.view(tensor.view))
        return out


def read_config(directory: str | Path, step: int | None = None) -> RunConfig:
    """The configuration of the run that saved a step; by default the step that the tracker names.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    return open_checkpoint(step_directory(directory, step)[1]).config


def read_identity(directory: str | Path, step: int | None = None) -> RunIdentity:
    """Vocabulary, tokenizer and data of the run that saved a step; by default the tracker's step.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    return open_checkpoint(step_directory(directory, step)[1]).identity


def load_logical(
    directory: str | Path,
    step: int | None = None,
    *,
    kind: str = MODEL,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Whole logical tensors, one at a time, on the CPU; needs no process group.

    Args:
        directory: of the run's checkpoints.
        step: by default the one that the tracker names.
        kind: `model` for weights, or a kind of optimizer state such as `exp_avg`.
        names: of the tensors; by default all.

    Raises:
        UsageError: there is no such checkpoint, it is damaged, or it lacks one of ``names``.
    """
    opened = open_checkpoint(step_directory(directory, step)[1])
    present = [name for k, name in opened.tensors if k == kind]
    wanted = present if names is None else list(names)
    missing = sorted(set(wanted) - set(present))
    if missing:
        expected = f"those of {kind} tensors in {opened.path}"
        raise CheckpointError("names", ", ".join(missing), expected)
    used = {file for name in wanted for file, _ in opened.tensors[kind, name].blocks}
    verify_files(opened.path, opened.files, sorted(used))
    reader = TensorReader(opened.path, opened.tensors)
    for name in wanted:
        yield name, reader.whole(kind, name)


def verify(directory: str | Path, step: int | None = None) -> None:
    """Prove that a checkpoint is complete: checksums of all files, and every block of the index.

    Raises:
        UsageError: it is not; every damaged file is named.
    """
    try:
        opened = open_checkpoint(step_directory(directory, step)[1])
    except CheckpointError:
        raise
    except UsageError as error:
        what = f"configuration in checkpoint {directory}"
        raise Corrupt(what, str(error), "that of a run") from None
    verify_files(opened.path, opened.files, opened.files)
    files = TensorFiles(opened.path)
    for tensor in opened.tensors.values():
        for file, block in tensor.blocks:
            key = block_key(tensor.kind, tensor.name, block.offsets)
            files.tensor(file, key, tensor.dtype, block.sizes)
