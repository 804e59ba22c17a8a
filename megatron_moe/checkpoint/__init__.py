"""Checkpoints: saved by any layout, loaded by any other, committed atomically.

docs/checkpoint.md describes the format and the rules. In reading order:

    save    manager.py    entry points: `save_checkpoint`; `CheckpointManager` for a run's saves
            contents.py   what one rank saves: blocks of tensors, assigned to files
            save.py       one save: start, write, commit; synchronous or asynchronous
    load    select.py     which step
            load.py       entry point `load_checkpoint`: open, plan, check, verify, fill
            reading.py    any block of any tensor; `load_logical` and `verify` without ranks
    format  directory.py  names, tracker, manifest, atomic commit
            lock.py, owner.py  one writer for each directory
            foreign.py    what else lies in a directory: weights of other programs
            metadata.py   config.json and state.json
            index.py      which file holds which block of which tensor
            tensor_files.py, disk.py   bytes of safetensors files; writing, hashing, syncing
    other   compare.py    whether a checkpoint is compatible with a run
            rng.py        random states

Reading a checkpoint needs no Megatron-Core. Saving and loading a run do, and are imported when they
are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.directory import has_checkpoint, latest_step
from megatron_moe.checkpoint.metadata import RunIdentity, TrainState
from megatron_moe.checkpoint.reading import load_logical, read_config, read_identity, verify
from megatron_moe.errors import CheckpointError, Corrupt

if TYPE_CHECKING:
    from megatron_moe.checkpoint.load import load_checkpoint
    from megatron_moe.checkpoint.manager import CheckpointManager, save_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "Corrupt",
    "RunIdentity",
    "TrainState",
    "has_checkpoint",
    "latest_step",
    "load_checkpoint",
    "load_logical",
    "read_config",
    "read_identity",
    "save_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "load_checkpoint":
        from megatron_moe.checkpoint.load import load_checkpoint

        return load_checkpoint
    if name in ("save_checkpoint", "CheckpointManager"):
        from megatron_moe.checkpoint import manager

        return getattr(manager, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
