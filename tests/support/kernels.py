"""Which kernels a test can have on this machine."""

from __future__ import annotations

import pytest

from fused_kernels import native, registry

IMPLEMENTATIONS = tuple(registry.IMPLEMENTATIONS)


def need(implementation: str) -> None:
    """Skip the test, with the reason, where there is no compiler for the native kernels."""
    why_not = native.unavailable() if implementation == "native" else None
    if why_not is not None:
        pytest.skip(f"native kernels: {why_not}")
