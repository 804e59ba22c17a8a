"""The platform without one of its patches, to show what the patch is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_moe.platform import activate, activation, deactivate
from megatron_moe.platform.patches import CPU_PATCHES


@contextmanager
def without(name: str) -> Iterator[None]:
    """All patches but one; on exit all of them."""
    assert name in [kind.name for kind in CPU_PATCHES], name
    deactivate()
    try:
        for kind in CPU_PATCHES:
            if kind.name != name:
                patch = kind()
                # In the list of `activate`, which then has nothing left to do.
                activation._applied.append(patch)
                patch.apply()
        yield
    finally:
        deactivate()
        activate()
