"""The platform without one of its patches, to show what the patch is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_moe.platform import activate, activation, deactivate
from megatron_moe.platform.patches import patches_of
from megatron_moe.platform.release import installed_release


@contextmanager
def without(name: str) -> Iterator[None]:
    """All patches but one; on exit all of them."""
    kinds = patches_of(installed_release())
    assert name in [kind.name for kind in kinds], name
    deactivate()
    try:
        for kind in kinds:
            if kind.name != name:
                patch = kind()
                # In the list of `activate`, which then has nothing left to do.
                activation._applied.append(patch)
                patch.apply()
        yield
    finally:
        deactivate()
        activate()
