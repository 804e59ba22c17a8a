"""Open a checkpoint and read it without ranks: the newest step, its configuration, its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.directory import step_directory
from megatron_moe.checkpoint.files import read_json
from megatron_moe.checkpoint.index import INDEX, LogicalTensor, Name, TensorReader, block_key
from megatron_moe.checkpoint.manifest import MANIFEST, read_manifest, require_whole
from megatron_moe.checkpoint.mapped import TensorFiles
from megatron_moe.checkpoint.state import RunIdentity, TrainState, metadata_from, train_state_from
from megatron_moe.checkpoint.stream import FileRecord
from megatron_moe.config import RunConfig
from megatron_moe.errors import CheckpointError, Corrupt, UsageError
from megatron_moe.model.sharding.parts import MODEL

CONFIG = "config.json"
STATE = "state.json"


@dataclass(frozen=True)
class CheckpointMetadata:
    """A checkpoint whose JSON files were verified; its tensor files were not yet."""

    path: Path
    files: dict[str, FileRecord]
    config: RunConfig
    train: TrainState
    metadata: RunIdentity
    optimizer: dict[str, Any] | None
    """Optimizer state that no tensor holds, `step`; None if there is no optimizer state."""
    random: dict[str, int] | None
    """The layout whose random states are saved; None if there are none."""
    tensors: dict[Name, LogicalTensor]

    @property
    def tensor_files(self) -> list[str]:
        """Files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))


Documents = dict[str, dict[str, Any]]
"""The JSON files of a checkpoint by name, its manifest as file name -> [SHA-256, bytes]."""


def open_checkpoint(path: Path) -> CheckpointMetadata:
    """Read and verify everything but the tensors of one step.

    Args:
        path: from `step_directory`.

    Raises:
        Corrupt: a file is missing, changed or not what it should be.
    """
    return opened_from(path, read_documents(path))


def read_documents(path: Path) -> Documents:
    """The small files of a step, as they were written; any rank can be told them.

    Raises:
        Corrupt: one is missing, changed or not what it should be.
    """
    files = read_manifest(path)
    names = [name for name in (CONFIG, STATE, INDEX) if name in files]
    if len(names) < 3:
        raise Corrupt(str(path), names, f"{CONFIG}, {STATE} and {INDEX} in its manifest")
    require_whole(path, files, names)
    listed = {name: [record.sha256, record.bytes] for name, record in files.items()}
    return {MANIFEST: listed, **{name: read_json(path / name) for name in names}}


def opened_from(path: Path, documents: Documents) -> CheckpointMetadata:
    """What the documents of a step say; without the index there are no tensors.

    Raises:
        Corrupt: they are not what they should be.
    """
    files = {name: FileRecord(*entry) for name, entry in documents[MANIFEST].items()}
    state, source = _state(documents[STATE], path), str(path / STATE)
    found = index.from_json(documents.get(INDEX, {}), str(path / INDEX))
    tensors = {(t.kind, t.name): t for t in found}
    for tensor in tensors.values():
        for file, _ in tensor.blocks:
            if file not in files:
                raise Corrupt(f"file of {tensor.name} in {path / INDEX}", file, "in the manifest")
    return CheckpointMetadata(
        path=path,
        files=files,
        config=_config(documents[CONFIG], path),
        train=train_state_from(state["train"], source),
        metadata=metadata_from(state["metadata"], source),
        optimizer=state["optimizer"],
        random=state["random"],
        tensors=tensors,
    )


def _state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    source = str(path / STATE)
    if state.keys() != {"train", "metadata", "optimizer", "random"}:
        raise Corrupt(source, sorted(state), "train, metadata, optimizer, random")
    optimizer = state["optimizer"] or {"step": None}
    steps = optimizer.get("step") if isinstance(optimizer, dict) else "none"
    if not (steps is None or (type(steps) is int and 0 <= steps < 2**31)):
        raise Corrupt(f"optimizer in {source}", optimizer, "a number of steps")
    return state


def _config(values: dict[str, Any], path: Path) -> RunConfig:
    try:
        return RunConfig.from_dict(values, str(path / CONFIG))
    except (TypeError, AttributeError) as error:
        raise Corrupt(str(path / CONFIG), repr(error), "a run's configuration") from None


def read_config(directory: str | Path, step: int | None = None) -> RunConfig:
    """The configuration of the run that saved a step, by default the newest.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    return open_checkpoint(step_directory(directory, step)[1]).config


def read_metadata(directory: str | Path, step: int | None = None) -> RunIdentity:
    """Vocabulary, tokenizer and data of the run that saved a step, by default the newest.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    return open_checkpoint(step_directory(directory, step)[1]).metadata


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
        names: only these; by default all.

    Raises:
        UsageError: there is no such checkpoint, it is damaged, or it lacks one of ``names``.
    """
    opened = open_checkpoint(step_directory(directory, step)[1])
    present = [name for k, name in opened.tensors if k == kind]
    wanted = present if names is None else list(names)
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise CheckpointError(f"{kind} tensors of {opened.path}", "missing", ", ".join(missing))
    used = {file for name in wanted for file, _ in opened.tensors[kind, name].blocks}
    require_whole(opened.path, opened.files, sorted(used))
    reader = TensorReader(opened.path, opened.tensors)
    for name in wanted:
        yield name, reader.whole(kind, name)


def verify(directory: str | Path, step: int | None = None) -> None:
    """Prove that a checkpoint is whole: checksums of all files, and every block where it should be.

    Raises:
        UsageError: it is not; every damaged file is named.
    """
    try:
        opened = open_checkpoint(step_directory(directory, step)[1])
    except CheckpointError:
        raise
    except UsageError as error:
        raise Corrupt(str(directory), str(error), "a run's configuration") from None
    require_whole(opened.path, opened.files, opened.files)
    files = TensorFiles(opened.path)
    for tensor in opened.tensors.values():
        for file, block in tensor.blocks:
            key = block_key(tensor.kind, tensor.name, block.offsets)
            files.tensor(file, key, tensor.dtype, block.sizes)
