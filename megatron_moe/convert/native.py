"""Native checkpoints as source and target of conversions. Optimizer state is not converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint import directory as directories
from megatron_moe.checkpoint.directory import step_directory, verify_files
from megatron_moe.checkpoint.disk import FileRecord, write_bytes, write_json
from megatron_moe.checkpoint.index import INDEX, LogicalTensor, block_key, to_json
from megatron_moe.checkpoint.metadata import (
    CONFIG,
    STATE,
    CheckpointMetadata,
    RunIdentity,
    TrainState,
    open_checkpoint,
    state_json,
)
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.checkpoint.tensor_files import (
    DTYPES,
    FORMAT_METADATA,
    TORCH_DTYPES,
    write_tensors,
)
from megatron_moe.convert.model import LazyTensor, LogicalModel
from megatron_moe.convert.writing import Progress, split_into_files, write_error
from megatron_moe.model.sharding.blocks import MODEL, Block
from megatron_moe.tokenizer.files import NAMES, files_of, stored_name


def read_native(directory: str | Path, step: int | None = None) -> LogicalModel:
    """Read a step of a run, by default that of the tracker; all model files are checksummed.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    opened = open_checkpoint(step_directory(directory, step)[1])
    names = [name for kind, name in opened.tensors if kind == MODEL]
    used = {file for name in names for file, _ in opened.tensors[MODEL, name].blocks}
    stored = [name for name in NAMES if name in opened.files]
    verify_files(opened.path, opened.files, sorted([*used, *stored]))
    files = tuple(opened.path / name for name in stored)
    elsewhere = opened.config.data.tokenizer_model
    if not files and elsewhere is not None:  # a checkpoint of an earlier version
        files = files_of(Path(elsewhere))
    return LogicalModel(
        source=str(opened.path),
        config=opened.config,
        vocab_size=opened.identity.padded_vocab_size,
        tensors={name: _lazy(opened, name) for name in names},
        step=opened.train.iteration,
        tokenizer_hash=opened.identity.tokenizer_hash,
        tokenizer_files=files,
    )


def _lazy(opened: CheckpointMetadata, name: str) -> LazyTensor:
    """A tensor whose rows are read from those blocks that overlap them, and no others."""
    tensor = opened.tensors[MODEL, name]
    dtype, shape = TORCH_DTYPES[tensor.dtype], tensor.shape

    def rows(start: int, stop: int) -> Tensor:
        # A reader per range: closing it unmaps its pages, so memory does not grow with the file.
        reader = TensorReader(opened.path, opened.tensors)
        sizes = (stop - start, *shape[1:])
        out = torch.empty(sizes, dtype=dtype)
        reader.fill(MODEL, name, Block(shape, (start, *(0,) * (len(shape) - 1)), sizes), out)
        return out

    return LazyTensor(shape, dtype, rows)


def write_native(model: LogicalModel, directory: Path, max_shard: int, progress: Progress) -> Path:
    """Write a checkpoint without optimizer and random states, and point the tracker at it.

    Args:
        model: the model to write.
        directory: checkpoint directory of a run; its other steps are kept.
        max_shard: maximal bytes of a file; a larger tensor gets its own.
        progress: called with the bytes written.

    Returns:
        The directory of the step.

    Raises:
        CheckpointError: the directory is not writable or the disk is full; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        temporary = directories.begin(directory, model.step)
        tensors: list[LogicalTensor] = []
        files: dict[str, FileRecord] = {}
        for number, names in enumerate(split_into_files(model.tensors, max_shard)):
            file = f"rank-{number:05d}.safetensors"
            pending = []
            for name in names:
                tensor = model.tensors[name]
                block = Block.whole(tensor.shape)
                key = block_key(MODEL, name, block.offsets)
                pending.append(tensor.pending(key, progress))
                dtype = DTYPES[tensor.dtype]
                shape = tensor.shape
                tensors.append(LogicalTensor(MODEL, name, shape, dtype, shape, ((file, block),)))
            files[file] = write_tensors(temporary / file, pending, FORMAT_METADATA)
        for name, value in {**_json_files(model), INDEX: to_json(tensors)}.items():
            files[name] = write_json(temporary / name, value)
        for path in model.tokenizer_files:
            name = stored_name(path)
            files[name] = write_bytes(temporary / name, path.read_bytes())
        return directories.commit(temporary, model.step, files)
    except OSError as error:
        raise write_error(directory, model.bytes, error) from error
    finally:
        if temporary is not None:
            directories.discard(temporary)


def _json_files(model: LogicalModel) -> dict[str, object]:
    """Configuration and train state by file name; a run resumes from it with `--finetune`."""
    identity = RunIdentity(padded_vocab_size=model.vocab_size, tokenizer_hash=model.tokenizer_hash)
    config, dtypes = model.config, {tensor.dtype for tensor in model.tensors.values()}
    if dtypes in ({torch.float32}, {torch.bfloat16}):
        # A run computes in the dtype of the weights that it loads, without a silent cast.
        train = replace(config.train, bf16=dtypes == {torch.bfloat16})
        config = replace(config, train=train)
    return {
        CONFIG: config.to_dict(),
        STATE: state_json(TrainState(iteration=model.step), identity),
    }
