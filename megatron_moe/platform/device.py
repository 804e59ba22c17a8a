"""Facts about the device for metrics: peak arithmetic and memory in use."""

from __future__ import annotations

import resource
import sys
import time

import torch

_GPU_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 1125.0),
    ("H200", 989.4, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.7),
    ("H100", 989.4, 494.7),
    ("H800", 989.4, 494.7),
    ("A100", 312.0, 156.0),
    ("A800", 312.0, 156.0),
    ("L40S", 362.1, 183.2),
    ("A40", 149.7, 74.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)
"""(part of the device's name, dense BF16, dense TF32) in TFLOP/s, from NVIDIA's data sheets without
sparsity. More specific names come first."""


def peak_tflops(device: torch.device, bf16: bool) -> float | None:
    """Peak arithmetic of one device in TFLOP/s.

    Args:
        device: a GPU, looked up by its name; or the CPU, where a GEMM is measured.
        bf16: of bfloat16; otherwise of the fastest fp32 GEMM (TF32 on GPUs).

    Returns:
        `None` for a GPU that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bf16_peak, tf32_peak in _GPU_PEAKS:
            if part in name:
                return bf16_peak if bf16 else tf32_peak
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


def _measured_gemm(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """The best of a few square GEMMs, TFLOP/s, with the threads that torch has now."""
    a = torch.ones(size, size, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best / 1e12
