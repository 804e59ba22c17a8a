"""The device: its peak arithmetic, its memory in use, and what a CPU's allocator keeps.

The C library returns every large block to the kernel when it is freed, and gets it back zeroed,
page by page, when the next step allocates the same tensor. Measured on one MoE layer of 16 experts
of 768 x 2048 with 4096 tokens, on one thread: the kernel takes 280 ms of a pass of 1930 ms, and
nothing with `keep_freed_memory`, which makes the C library behave as the CUDA caching allocator
does. The memory that a process has needed at once stays with it.
"""

from __future__ import annotations

import ctypes
import functools
import resource
import statistics
import sys
import time

import torch

_GPU_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 PCIe", 756.0, 378.0, 51.2),
    ("H100 NVL", 835.5, 417.7, 60.0),
    ("H100", 989.4, 494.7, 66.9),
    ("H800", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A800", 312.0, 156.0, 19.5),
    ("L40S", 362.1, 183.2, 91.6),
    ("A40", 149.7, 74.8, 37.4),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 35.6, 35.6),
)
"""(part of the device's name, dense BF16, dense TF32, FP32 outside of tensor cores) in TFLOP/s,
from NVIDIA's data sheets without sparsity. The first part that occurs in the name counts, so more
specific ones come first."""


def peak_tflops(device: torch.device, bf16: bool) -> float | None:
    """Peak arithmetic of one device in TFLOP/s.

    Args:
        device: a GPU, looked up by its name; or the CPU, where a GEMM is measured.
        bf16: of bfloat16; otherwise of fp32 GEMMs as torch runs them now: in TF32 only if that is
            on (`torch.backends.cuda.matmul.fp32_precision`), which is not torch's default.

    Returns:
        `None` for a GPU that is not in `_GPU_PEAKS`.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        for part, bf16_peak, tf32_peak, fp32_peak in _GPU_PEAKS:
            if part in name:
                return bf16_peak if bf16 else tf32_peak if tf32 else fp32_peak
        return None
    return _measured_gemm(torch.bfloat16 if bf16 else torch.float32)


def memory_stats(device: torch.device) -> dict[str, int]:
    """Memory of this process in bytes.

    Returns:
        `allocated`, `reserved` and `max_allocated` of the GPU's allocator; on a CPU the resident
        set now as the first two, and its peak.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "max_allocated": torch.cuda.max_memory_allocated(device),
        }
    resident = _resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return {
        "allocated": resident,
        "reserved": resident,
        "max_allocated": max(peak_bytes, resident),
    }


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def gemm_tflops(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """TFLOP/s of a square matrix product on one device, the median of a few.

    Unlike a step it waits for no other rank, so that it shows which device is slow.

    Args:
        device: in bf16 on a GPU, in fp32 on a CPU.
        size: rows and columns; by default 4096 (100 MB of memory for a moment), on a CPU 512.
        repeats: measured products, after two that warm up.
    """
    on_gpu = device.type == "cuda"
    size = size or (4096 if on_gpu else 512)
    a = torch.ones(size, size, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    out = torch.empty_like(a)
    times = []
    for number in range(2 + repeats):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if on_gpu:
            torch.cuda.synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e12


def _measured_gemm(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """The best of a few square GEMMs in TFLOP/s, with the current number of threads."""
    a = torch.ones(size, size, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best / 1e12


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""
_KEEP = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
"""No mapping for a single block, no return of the end of the heap, growth by 64 MiB."""
_DEFAULT = ((_M_MMAP_MAX, 65536), (_M_TRIM_THRESHOLD, 128 << 10), (_M_TOP_PAD, 128 << 10))


def keep_freed_memory() -> bool:
    """Keep freed memory in the process.

    Returns:
        Whether the C library can: only glibc has the setting.
    """
    return _set(_KEEP)


def release_freed_memory() -> bool:
    """Restore the C library's defaults and return free memory to the kernel.

    Returns:
        Whether the C library can.
    """
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
