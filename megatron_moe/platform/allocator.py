"""Let a CPU process keep the memory it frees, as the CUDA caching allocator does on a GPU.

The C library returns every large block to the kernel when it is freed and gets it back, zeroed page
by page, when the same tensor is made in the next step. Measured on one MoE layer of 16 experts of
768 x 2048 with 4096 tokens, one thread: 280 ms of a pass of 1930 ms are spent in the kernel like
that, and none with the setting below. What a process ever needed at once stays with it.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""
_KEEP = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
"""No block of its own mapping, no return of the heap's end, growth by 64 MiB."""
_DEFAULT = ((_M_MMAP_MAX, 65536), (_M_TRIM_THRESHOLD, 128 << 10), (_M_TOP_PAD, 128 << 10))


def keep_freed_memory() -> bool:
    """Keep it; whether this C library can (only glibc has the setting)."""
    return _set(_KEEP)


def release_freed_memory() -> bool:
    """Back to the C library's defaults, and what is free now back to the kernel."""
    library = _glibc()
    if library is None:
        return False
    done = _set(_DEFAULT)
    library.malloc_trim(0)
    return done


def _set(values: tuple[tuple[int, int], ...]) -> bool:
    library = _glibc()
    return library is not None and all(library.mallopt(name, value) for name, value in values)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    library.malloc_trim.argtypes = (ctypes.c_size_t,)
    return library
