"""Which kernels a test can have on this machine."""

from __future__ import annotations

import pytest

from fused_kernels import registry
from fused_kernels.native.library import NativeUnavailable, compiler, library

IMPLEMENTATIONS = tuple(
    name for name, devices in registry.IMPLEMENTATIONS.items() if "cpu" in (devices or {"cpu"})
)
"""Those for a CPU."""


def need(implementation: str) -> None:
    """Skip the test where there is no compiler for the native kernels, and say so.

    Where there is one, what it cannot make is a failure.
    """
    if implementation != "native":
        return
    try:
        compiler()
    except NativeUnavailable as why_not:
        pytest.skip(f"native kernels: {why_not}")
    library()
