"""Facts for metrics: arithmetic peaks and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.platform import activate
from megatron_moe.platform.device import memory_stats, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4),
        ("NVIDIA H100 PCIe", True, 756.0),
        ("NVIDIA H200", False, 494.7),
        ("NVIDIA A100-SXM4-80GB", True, 312.0),
        ("NVIDIA A100-SXM4-80GB", False, 156.0),
        ("Somebody's Accelerator", True, None),
    ],
)
def test_gpu_peaks_are_looked_up_by_name(
    name: str, bf16: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), bf16) == peak


def test_the_cpu_s_peak_is_that_of_a_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks 2 ms per look, 2 x 1024^3 operations in a tick are 1.07 TFLOP/s."""
    import megatron_moe.platform.device as device

    ticks = iter(range(100))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(ticks) * 2e-3)
    peak = activate().peak_tflops()
    assert peak == pytest.approx(2 * 1024**3 / 2e-3 / 1e12)


def test_memory_grows_by_what_is_allocated() -> None:
    size = 64 << 20
    before = memory_stats(torch.device("cpu"))
    held: Any = torch.ones(size, dtype=torch.uint8)
    after = activate().device_memory_stats()
    assert after["allocated"] - before["allocated"] > 0.9 * size
    assert after["max_allocated"] >= after["allocated"]
    assert held.sum() == size % 256 + size - size % 256
