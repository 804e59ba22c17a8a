"""The kernels of `--moe-dispatch-impl`, chosen in one place."""

from __future__ import annotations

import functools

from fused_kernels import Kernel, KernelUnavailable, select_all
from megatron_moe.errors import UsageError


@functools.cache
def kernels_of(requested: str, device_type: str) -> dict[str, Kernel]:
    """By operation.

    Raises:
        UsageError: they are not available here; it says why.
    """
    try:
        return select_all(requested, device_type)
    except KernelUnavailable as error:
        raise UsageError("--moe-dispatch-impl", error.requested, error.expected) from None
