"""Freed memory stays with the process, or does not."""

from __future__ import annotations

import ctypes
import multiprocessing

import pytest
import torch

from megatron_moe.platform import activate, allocator, deactivate

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
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not allocator.keep_freed_memory()
    assert not allocator.release_freed_memory()
