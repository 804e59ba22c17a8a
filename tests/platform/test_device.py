"""Facts for metrics (arithmetic peaks, memory), and freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import subprocess
import sys

import pytest
import torch

from megatron_moe.platform import activate, deactivate, device
from megatron_moe.platform.device import memory_stats, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4),
        ("NVIDIA H100 PCIe", True, 756.0),
        ("NVIDIA A100-SXM4-80GB", True, 312.0),
        ("NVIDIA A100-SXM4-80GB", False, 19.5),
        ("Somebody's Accelerator", True, None),
    ],
)
def test_gpu_peaks_are_looked_up_by_name(
    name: str, bf16: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), bf16) == peak


@pytest.mark.parametrize(
    ("turn_on", "peak"),
    [
        ("pass", 66.9),
        ("torch.backends.cuda.matmul.allow_tf32 = True", 494.7),
        ("torch.set_float32_matmul_precision('high')", 494.7),
        pytest.param("torch.set_float32_matmul_precision('highest')", 66.9, marks=pytest.mark.slow),
        pytest.param("torch.backends.fp32_precision = 'tf32'", 494.7, marks=pytest.mark.slow),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", 66.9),
    ],
)
def test_the_peak_of_fp32_is_that_of_tf32_only_where_torch_uses_it(
    turn_on: str, peak: float
) -> None:
    """In a process of its own: the setting belongs to the process. 7.4 times too low an MFU
    otherwise, or too high.
    """
    code = (
        f"import torch; {turn_on}; torch.cuda.get_device_name = lambda device: 'NVIDIA H200';"
        "from megatron_moe.platform.device import peak_tflops;"
        "gpu = torch.device('cuda', 0); print(peak_tflops(gpu, False), peak_tflops(gpu, True))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(peak), "989.4"]


def test_the_cpu_s_peak_is_that_of_a_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks 2 ms per look, 2 x 1024^3 operations in a tick are 1.07 TFLOP/s."""
    ticks = iter(range(100))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(ticks) * 2e-3)
    peak = activate().peak_tflops()
    assert peak == pytest.approx(2 * 1024**3 / 2e-3 / 1e12)


def test_memory_grows_by_what_is_allocated() -> None:
    size = 64 << 20
    before = memory_stats(torch.device("cpu"))
    # A mapping of its own: the C library may have free memory that is resident already.
    held = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
    after = activate().device_memory_stats()
    assert after["allocated"] - before["allocated"] > 0.9 * size
    assert after["max_allocated"] >= after["allocated"]
    assert held.sum() == size


ELEMENTS = 250_000_000
"""1 GB that is never written: larger than any free block of the heap."""


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo`; the fourth field counts blocks with a mapping of their own."""

    _fields_ = [("before", ctypes.c_int * 3), ("hblks", ctypes.c_int), ("after", ctypes.c_int * 6)]


def own_mappings_of_a_large_tensor() -> int:
    """How many mappings of its own the C library makes for it: such a block is never kept."""
    mallinfo = ctypes.CDLL(None).mallinfo
    mallinfo.restype = _Mallinfo
    before = mallinfo().hblks
    tensor = torch.empty(ELEMENTS)
    found = mallinfo().hblks - before
    del tensor
    return found


def watched_changes() -> None:
    """Exit code 0 if activation keeps memory and deactivation lets it go."""
    activate()
    assert own_mappings_of_a_large_tensor() == 0
    deactivate()
    assert own_mappings_of_a_large_tensor() == 1
    activate()
    assert own_mappings_of_a_large_tensor() == 0


def test_activation_keeps_memory_and_deactivation_lets_it_go() -> None:
    """In a process of its own: after an allocation that failed, as other tests provoke, the C
    library serves a thread from an arena in which it maps every large block.
    """
    process = multiprocessing.get_context("spawn").Process(target=watched_changes)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_glibc", lambda: None)
    assert not device.keep_freed_memory()
    assert not device.release_freed_memory()
