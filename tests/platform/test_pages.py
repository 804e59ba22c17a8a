"""Huge pages are asked for where they help and change no value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moe.platform import pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What `madvise` is asked."""
    asked: list[tuple[int, int, int]] = []

    def advise(first: int, length: int, kind: int) -> int:
        asked.append((first, length, kind))
        return 0

    monkeypatch.setattr(pages, "_madvise", lambda: advise)
    return asked


def test_only_whole_huge_pages_inside_the_tensor_are_marked(
    advice: list[tuple[int, int, int]],
) -> None:
    tensor = torch.empty(5_000_000)
    assert pages.prefer_huge_pages(tensor) is tensor
    ((first, length, kind),) = advice
    assert first % pages.HUGE_PAGE == length % pages.HUGE_PAGE == 0
    assert tensor.data_ptr() <= first < first + length <= tensor.data_ptr() + 20_000_000
    assert length >= 20_000_000 - 2 * pages.HUGE_PAGE
    assert kind == 14


def test_small_tensors_and_tensors_without_memory_are_left_alone(
    advice: list[tuple[int, int, int]],
) -> None:
    pages.prefer_huge_pages(torch.empty(1000))
    pages.prefer_huge_pages(torch.empty(5_000_000, device="meta"))
    assert advice == []


def test_without_madvise_a_tensor_is_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.empty_like(torch.empty(5_000_000)).numel() == 5_000_000


def test_this_kernel_gives_huge_pages_if_it_gives_any() -> None:
    tensor = pages.empty_like(torch.empty(16_000_000)).fill_(1.0)
    assert tensor.sum() == 16_000_000
    smaps = Path("/proc/self/smaps_rollup")
    if MODE.exists() and "[never]" not in MODE.read_text() and smaps.exists():
        (line,) = (x for x in smaps.read_text().splitlines() if x.startswith("AnonHugePages"))
        assert int(line.split()[1]) > 0
