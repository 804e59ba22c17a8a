"""Operations in Triton for CUDA devices, each in one pass over memory where that is possible.

Triton is imported by the modules of the operations, so only where they are selected. Triton
compiles a kernel when it first runs with some widths and dtypes, for about a second, and caches it
in `$TRITON_CACHE_DIR` or `~/.triton/cache`. `launch` starts kernels; `make check-kernels` compiles
every one ahead of time for devices that are not there.

Kernels compute in fp32, or fp64 for fp64 operands, and round once. Sums have a fixed order: equal
inputs give equal bits. They do not check indices, as a check would wait for the device. A kernel
that skips an index out of range, where that costs nothing, says so.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

CAPABILITY = (8, 0)
"""Least compute capability that the kernels are compiled for: bfloat16 needs it."""


@functools.cache
def unavailable() -> str | None:
    """Why the kernels do not run on this machine; `None` if they do."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "triton==3.7.1")'
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"compute capability {found[0]}.{found[1]}, expected {least} or more"
    return None
