"""The patches with which Megatron-Core runs without a GPU, of `torch.cuda` and of its own code.

Importing these modules changes nothing; `megatron_moe.platform.activate` applies the patches.
"""

from __future__ import annotations

from megatron_moe.platform.patches.base import Patch, PatchMismatchError
from megatron_moe.platform.patches.megatron_core import (
    DeviceLiterals,
    HostSplits,
    KnownWarnings,
    NoFusion,
    NoTransformerEngine,
    RouterGemm,
    ShareStorage,
    TensorTypeNames,
)
from megatron_moe.platform.patches.torch_cuda import (
    CurrentDevice,
    MoveToDevice,
    RandomState,
    RandomStateWarning,
    Streams,
)

CPU_PATCHES: tuple[type[Patch], ...] = (
    KnownWarnings,
    CurrentDevice,
    MoveToDevice,
    Streams,
    NoTransformerEngine,
    NoFusion,
    DeviceLiterals,
    TensorTypeNames,
    RandomState,
    RandomStateWarning,
    RouterGemm,
    HostSplits,
    ShareStorage,
)
"""In the order in which they are applied, each to the releases that it fits. The first four change
only torch and the fifth hides a package; `NoFusion` imports Megatron-Core, with those in effect,
unless it is imported already."""


def patches_of(release: str) -> tuple[type[Patch], ...]:
    """The patches that a release of Megatron-Core needs, in order."""
    return tuple(kind for kind in CPU_PATCHES if release in kind.releases)


__all__ = ["CPU_PATCHES", "Patch", "PatchMismatchError", "patches_of"]
