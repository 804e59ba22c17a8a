"""What it takes to run Megatron-Core without a GPU: small patches, one family a file.

Nothing happens when these modules are imported; `megatron_moe.platform.activate` applies them.
"""

from __future__ import annotations

from megatron_moe.platform.patches.base import EngineMismatchError, Patch
from megatron_moe.platform.patches.devices import (
    CurrentDevice,
    DeviceLiterals,
    MoveToDevice,
    TensorTypeNames,
)
from megatron_moe.platform.patches.fusion import NoFusion
from megatron_moe.platform.patches.missing import HostSplits, RouterGemm
from megatron_moe.platform.patches.noise import KnownWarnings
from megatron_moe.platform.patches.random import RandomState, RandomStateWarning
from megatron_moe.platform.patches.streams import Streams

CPU_PATCHES: tuple[type[Patch], ...] = (
    KnownWarnings,
    CurrentDevice,
    MoveToDevice,
    Streams,
    NoFusion,
    DeviceLiterals,
    TensorTypeNames,
    RandomState,
    RandomStateWarning,
    RouterGemm,
    HostSplits,
)
"""In the order in which they are applied; the first four touch only torch and come before the
engine is imported, in case it isn't yet."""

__all__ = ["CPU_PATCHES", "EngineMismatchError", "Patch"]
