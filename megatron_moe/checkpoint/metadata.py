"""The JSON files of a checkpoint beside its index: configuration, progress, identity of the run.

`open_checkpoint` reads and verifies them, and the index, without touching a tensor. Reading and
parsing are separate functions, so that one rank can read the files and broadcast them to others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.directory import MANIFEST, read_manifest, verify_files
from megatron_moe.checkpoint.disk import FileRecord, read_json
from megatron_moe.checkpoint.index import INDEX, LogicalTensor, Name
from megatron_moe.config import RunConfig
from megatron_moe.errors import Corrupt

CONFIG = "config.json"
"""The file with the run's resolved configuration."""
STATE = "state.json"
"""The file with progress, identity, and optimizer and random state that no tensor holds."""
JsonFiles = dict[str, dict[str, Any]]
"""Contents of a checkpoint's JSON files by name; the manifest's is name -> [SHA-256, bytes]."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """A run's progress.

    A new field would make checkpoints of earlier versions unreadable, since their `state.json` must
    have exactly these keys. New state is a key of `extra`.
    """

    iteration: int = 0
    """Optimizer steps done."""
    consumed_train_samples: int = 0
    """Sequences consumed by training: the sampler's position."""
    consumed_valid_samples: int = 0
    """Sequences consumed by evaluation. Part of the format; training leaves it at 0."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """State of the learning-rate schedule, as JSON values. Part of the format; training leaves it
    empty, because the learning rate is a function of the step."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other state of the run, as JSON values: see `training/consumed.py`, `saved_extra`."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run must share with the checkpoint that it loads."""

    padded_vocab_size: int
    """Vocabulary V after padding: rows of the embedding."""
    tokenizer_hash: str = ""
    """Identifies the tokenizer."""
    data_fingerprint: str = ""
    """Identifies the training data."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """An opened checkpoint: its JSON files are verified, its tensor files are not."""

    path: Path
    """Its directory."""
    files: dict[str, FileRecord]
    """The manifest."""
    config: RunConfig
    """Configuration of the run that saved it."""
    train: TrainState
    """Progress of that run."""
    identity: RunIdentity
    """Vocabulary, tokenizer and data of that run."""
    optimizer: dict[str, Any] | None
    """Optimizer state that no tensor holds, `step`; None if no optimizer state was saved."""
    random: dict[str, int] | None
    """The layout of the saved random states; None if none were saved."""
    tensors: dict[Name, LogicalTensor]
    """The index."""

    @property
    def tensor_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))


def state_json(
    train: TrainState,
    identity: RunIdentity,
    *,
    optimizer: dict[str, Any] | None = None,
    random: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The content of `state.json`; arguments as in `CheckpointMetadata`."""
    return {
        "train": asdict(train),
        "metadata": asdict(identity),
        "optimizer": optimizer,
        "random": random,
    }


def open_checkpoint(path: Path) -> CheckpointMetadata:
    """Read and verify everything but the tensors of one step.

    Args:
        path: from `step_directory`.

    Raises:
        Corrupt: a file is missing, changed or malformed.
    """
    return parse_json_files(path, read_json_files(path))


def read_json_files(path: Path) -> JsonFiles:
    """Read and verify the JSON files of a step; the result can be sent to other ranks.

    Raises:
        Corrupt: a file is missing, changed or malformed.
    """
    files = read_manifest(path)
    names = [name for name in (CONFIG, STATE, INDEX) if name in files]
    if len(names) < 3:
        expected = f"at least {CONFIG}, {STATE} and {INDEX}"
        raise Corrupt(f"files in {path / MANIFEST}", names, expected)
    verify_files(path, files, names)
    records = {name: [record.sha256, record.bytes] for name, record in files.items()}
    return {MANIFEST: records, **{name: read_json(path / name) for name in names}}


def parse_json_files(path: Path, content: JsonFiles) -> CheckpointMetadata:
    """Parse the JSON files of a step, checking every value.

    Args:
        path: the step's directory, for errors.
        content: from `read_json_files`; without the index, there are no tensors in the result.

    Raises:
        Corrupt: a file is malformed.
    """
    files = {name: FileRecord(*entry) for name, entry in content[MANIFEST].items()}
    state, source = _checked_state(content[STATE], path), str(path / STATE)
    found = index.from_json(content.get(INDEX, {}), str(path / INDEX))
    tensors = {(t.kind, t.name): t for t in found}
    for tensor in tensors.values():
        for file, _ in tensor.blocks:
            if file not in files:
                what = f"file of {tensor.name} in {path / INDEX}"
                raise Corrupt(what, file, "listed in the manifest")
    return CheckpointMetadata(
        path=path,
        files=files,
        config=_config(content[CONFIG], path),
        train=TrainState(**_typed(TrainState(), state["train"], source)),
        identity=RunIdentity(**_typed(RunIdentity(padded_vocab_size=0), state["metadata"], source)),
        optimizer=state["optimizer"],
        random=state["random"],
        tensors=tensors,
    )


def _checked_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    source = str(path / STATE)
    if state.keys() != {"train", "metadata", "optimizer", "random"}:
        raise Corrupt(f"keys of {source}", sorted(state), "train, metadata, optimizer, random")
    optimizer = state["optimizer"] or {"step": None}
    steps = optimizer.get("step") if isinstance(optimizer, dict) else "none"
    if not (steps is None or (type(steps) is int and 0 <= steps < 2**31)):
        raise Corrupt(f"optimizer in {source}", optimizer, "an object with a number of steps")
    return state


def _config(values: dict[str, Any], path: Path) -> RunConfig:
    try:
        return RunConfig.from_dict(values, str(path / CONFIG))
    except (TypeError, AttributeError) as error:
        raise Corrupt(str(path / CONFIG), repr(error), "a run's configuration") from None


def _typed(example: Any, values: Any, source: str) -> dict[str, Any]:
    """Fields of a dataclass from JSON, of exactly the types that ``example`` has."""
    kinds = {f.name: type(getattr(example, f.name)) for f in fields(example)}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        what, expected = f"progress or identity in {source}", f"an object of {', '.join(kinds)}"
        raise Corrupt(what, values, expected)
    for name, kind in kinds.items():
        # `type` rather than `isinstance`: true is an int in Python, but not a step.
        if type(values[name]) is not kind:
            raise Corrupt(f"{name} in {source}", values[name], f"of type {kind.__name__}")
    return values
