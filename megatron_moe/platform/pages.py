"""Large tensors on a CPU: ask the kernel for huge pages.

A fresh tensor of hundreds of megabytes comes from the kernel page by page, each zeroed when it is
first written. Measured with 2 threads, filling a fresh tensor of 134 MB takes 42 ms with 4 KiB
pages, 16 ms with huge ones and 9 ms when the memory was in use before: as much as a tenth of the
GEMMs that fill it. Nothing happens on a GPU, on systems without `madvise`, or to small tensors.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_BYTES = 4 << 20
"""Below this a tensor has too few whole huge pages to gain."""
HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty_like(like: Tensor) -> Tensor:
    """`torch.empty_like` in huge pages if it is large."""
    return prefer_huge_pages(torch.empty_like(like))


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, its memory marked before it is first written.

    Advice only: a kernel that does not follow it changes nothing but the speed.
    """
    size = tensor.numel() * tensor.element_size()
    if size < LEAST_BYTES or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return tensor
    advise = _madvise()
    if advise is not None:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + size - first) // HUGE_PAGE * HUGE_PAGE
        if length > 0:
            advise(first, length, _MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's `madvise`, where there is one that knows huge pages."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
