"""Checkpoints: saved by any layout, loaded by any other, and never half written.

The format and the rules are described in docs/checkpoint.md. Reading one needs no Megatron-Core;
what does, saving and loading a run, is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.directory import has_checkpoint, latest_step
from megatron_moe.checkpoint.reading import load_logical, read_config, read_metadata, verify
from megatron_moe.checkpoint.state import RunIdentity, TrainState
from megatron_moe.errors import CheckpointError, Corrupt

if TYPE_CHECKING:
    from megatron_moe.checkpoint.load import load_checkpoint
    from megatron_moe.checkpoint.save import save_checkpoint

__all__ = [
    "CheckpointError",
    "Corrupt",
    "RunIdentity",
    "TrainState",
    "has_checkpoint",
    "latest_step",
    "load_checkpoint",
    "load_logical",
    "read_config",
    "read_metadata",
    "save_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "load_checkpoint":
        from megatron_moe.checkpoint.load import load_checkpoint

        return load_checkpoint
    if name == "save_checkpoint":
        from megatron_moe.checkpoint.save import save_checkpoint

        return save_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
