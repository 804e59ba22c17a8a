"""Every allocation of a GPU with its stack (`--record-memory-history`).

A snapshot shows what holds memory, and what is asked for when it runs out: at
pytorch.org/memory_viz, which reads the file in a browser. Not run on a GPU yet.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config import LoggingConfig
from megatron_moe.errors import UsageError
from megatron_moe.platform import Platform
from megatron_moe.training.step_hook import Hook

ENTRIES = 100_000
"""Allocations and frees that are kept: some steps, in about 100 MB of host memory."""
_OBSERVE = "_cuda_attach_out_of_memory_observer"
"""Only PyTorch's CUDA builds have it."""


class MemoryHistory(Hook):
    """Records from the first step on; snapshots after `--profile-step-end` and out of memory.

    Args:
        logging: the file, and the step.
        rank: this rank, for the name of its file.
    """

    def __init__(self, logging: LoggingConfig, rank: int) -> None:
        path = Path(logging.memory_snapshot_path)
        self._path = path.with_name(f"{path.stem}-rank-{rank}{path.suffix}")
        self._last = logging.profile_step_end
        self._recording = False

    def start(self) -> None:
        """Begin to record, and watch for the end of memory."""
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
        getattr(torch._C, _OBSERVE)(self._out_of_memory)
        self._recording = True

    def after_step(self, iteration: int) -> None:
        """Write the snapshot of the profiled steps."""
        if iteration == self._last:
            self._write("")

    def close(self) -> None:
        """End recording."""
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False

    def _out_of_memory(self, *_: Any) -> None:
        # Called inside of the allocator, before the error is raised.
        self._write("-out-of-memory")

    def _write(self, what: str) -> None:
        path = self._path.with_name(f"{self._path.stem}{what}{self._path.suffix}")
        try:
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:  # a snapshot is not worth a run
            warnings.warn(f"{path} cannot be written: {error}", stacklevel=2)


def build_memory_history(
    logging: LoggingConfig, rank: int, platform: Platform
) -> MemoryHistory | None:
    """The recorder of this rank, if it records.

    Raises:
        UsageError: on every rank: there is no GPU, or no such directory.
    """
    if not logging.record_memory_history:
        return None
    if platform.kind == "cpu":
        expected = "unset on a CPU"
        raise UsageError("--record-memory-history", True, expected, "it records a GPU's allocator")
    if not Path(logging.memory_snapshot_path).parent.is_dir():
        expected = "a file in an existing directory"
        raise UsageError("--memory-snapshot-path", logging.memory_snapshot_path, expected)
    if logging.profile_ranks and rank not in logging.profile_ranks:
        return None
    return MemoryHistory(logging, rank)
