"""The platform with one of its patches left out, to see what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_moe.platform import activate, activation, deactivate
from megatron_moe.platform.patches import CPU_PATCHES


@contextmanager
def without(name: str) -> Iterator[None]:
    """All patches but one; afterwards all of them."""
    assert name in [kind.name for kind in CPU_PATCHES], name
    deactivate()
    try:
        for kind in CPU_PATCHES:
            if kind.name != name:
                patch = kind()
                # As `activate` does, which then takes them for all there is to do.
                activation._applied.append(patch)
                patch.apply()
        yield
    finally:
        deactivate()
        activate()
