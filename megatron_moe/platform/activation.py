"""Find out where we run, and on a CPU make the engine run there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_moe.errors import UsageError
from megatron_moe.platform import device as device_facts
from megatron_moe.platform.allocator import keep_freed_memory, release_freed_memory
from megatron_moe.platform.patches import CPU_PATCHES, Patch
from megatron_moe.platform.requirements import check_requirements

Backend = Literal["nccl", "gloo"]

_applied: list[Patch] = []
"""The patches in force. Patching is a fact of the process, so its record is one too."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where this process runs."""

    kind: Literal["cuda", "cpu"]
    """Accelerated or embedded."""
    device: torch.device
    """Where parameters and activations live."""
    backend: Backend
    """Communication library of the default process group."""
    patches: tuple[str, ...]
    """Names of the patches in force; empty on a GPU."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_tflops(self, bf16: bool = False) -> float | None:
        """Peak of one device in TFLOP/s: see `megatron_moe.platform.device.peak_tflops`."""
        return device_facts.peak_tflops(self.device, bf16)

    def device_memory_stats(self) -> dict[str, int]:
        """Bytes in use: see `megatron_moe.platform.device.memory_stats`."""
        return device_facts.memory_stats(self.device)


def activate(backend: Literal["auto", "nccl", "gloo"] = "auto") -> Platform:
    """Prepare this process for the engine. May be called any number of times.

    With a GPU nothing is patched. Without one, the patches of `megatron_moe.platform.patches` are
    applied and Megatron-Core is imported, whether or not somebody imported it before; and the C
    library keeps freed memory for the next step (`megatron_moe.platform.allocator`).

    Args:
        backend: `--distributed-backend`; `auto` is NCCL on GPUs and gloo on CPUs.

    Raises:
        UsageError: a requirement is missing, or the backend is not the device's: NCCL needs GPUs,
            and gloo has not all the collectives for their tensors.
        EngineMismatchError: a patch does not fit the installed Megatron-Core.
    """
    check_requirements()
    if torch.cuda.is_available():
        return _cuda(backend)
    if backend == "nccl":
        raise UsageError(
            "--distributed-backend", backend, "gloo or auto", "this machine has no GPU"
        )
    if not _applied:
        _apply_all()
        keep_freed_memory()
    names = tuple(patch.name for patch in _applied)
    return Platform(kind="cpu", device=torch.device("cpu"), backend="gloo", patches=names)


def deactivate() -> None:
    """Undo every patch of `activate`, in reverse order. Nothing to do on a GPU."""
    if _applied:
        release_freed_memory()
    while _applied:
        _applied.pop().undo()


def _cuda(backend: Literal["auto", "nccl", "gloo"]) -> Platform:
    if backend == "gloo":
        fix = "to run on the CPU here, hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        raise UsageError("--distributed-backend", backend, "nccl or auto on a GPU", fix)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        raise UsageError(
            "LOCAL_RANK", device.index, f"less than the {torch.cuda.device_count()} GPUs here"
        )
    torch.cuda.set_device(device)
    return Platform(kind="cuda", device=device, backend="nccl", patches=())


def _apply_all() -> None:
    try:
        for kind in CPU_PATCHES:
            patch = kind()
            # Registered first: undoing a half-applied patch is safe, forgetting it is not.
            _applied.append(patch)
            patch.apply()
    except BaseException:
        deactivate()
        raise
