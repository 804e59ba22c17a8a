"""Checkpoints: saved by any layout, loaded by any other, and never half written.

The format and the rules are described in docs/checkpoint.md.
"""

from megatron_moe.checkpoint.directory import has_checkpoint, latest_step
from megatron_moe.checkpoint.errors import CheckpointError, Corrupt
from megatron_moe.checkpoint.load import load_checkpoint
from megatron_moe.checkpoint.reading import load_logical, read_config, read_metadata, verify
from megatron_moe.checkpoint.save import save_checkpoint
from megatron_moe.checkpoint.state import Metadata, TrainState

__all__ = [
    "CheckpointError",
    "Corrupt",
    "Metadata",
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
