"""Detect the device, check the installation and, without a GPU, patch Megatron-Core for the CPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_moe.errors import UsageError
from megatron_moe.platform import device as device_facts
from megatron_moe.platform.device import keep_freed_memory, release_freed_memory
from megatron_moe.platform.patches import Patch, patches_of
from megatron_moe.platform.release import installed_release
from megatron_moe.platform.transformer_engine import check_installation

Backend = Literal["nccl", "gloo"]

_applied: list[Patch] = []
"""The patches in effect. They change the process, so their list belongs to the process too."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The device of this process, and how it communicates."""

    kind: Literal["cuda", "cpu"]
    """Whether there is a GPU."""
    device: torch.device
    """Device of parameters and activations."""
    backend: Backend
    """Communication library of the default process group."""
    patches: tuple[str, ...]
    """Names of the patches in effect; empty on a GPU."""

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_tflops(self, bf16: bool = False) -> float | None:
        """Peak of one device in TFLOP/s: see `megatron_moe.platform.device.peak_tflops`."""
        return device_facts.peak_tflops(self.device, bf16)

    def device_memory_stats(self) -> dict[str, int]:
        """Bytes in use: see `megatron_moe.platform.device.memory_stats`."""
        return device_facts.memory_stats(self.device)


def activate(backend: Literal["auto", "nccl", "gloo"] = "auto") -> Platform:
    """Prepare this process for Megatron-Core. May be called any number of times.

    With a GPU nothing is patched. Without one, the patches of `megatron_moe.platform.patches` are
    applied and Megatron-Core is imported, unless it is already; and the C library keeps freed
    memory for the next step (`keep_freed_memory`).

    Args:
        backend: `--distributed-backend`; `auto` is NCCL on GPUs and gloo on CPUs.

    Raises:
        UsageError: a requirement is missing, or the backend does not fit the device: NCCL needs
            GPUs, and gloo lacks some collectives for their tensors.
        PatchMismatchError: a patch does not fit the installed Megatron-Core.
    """
    check_requirements()
    if torch.cuda.is_available():
        with _without_wandb():
            for name in _IMPORT_WANDB:
                importlib.import_module(name)
        return _cuda(backend)
    if backend == "nccl":
        raise UsageError(
            "--distributed-backend", backend, "gloo or auto", "this machine has no GPU"
        )
    if not _applied:
        with _without_wandb():
            _apply_all()
        keep_freed_memory()
    names = tuple(patch.name for patch in _applied)
    return Platform(kind="cpu", device=torch.device("cpu"), backend="gloo", patches=names)


_IMPORT_WANDB = ("megatron.core.timers", "megatron.core.inference.contexts.dynamic_context")
"""Modules of Megatron-Core that import `wandb` if it is installed, and need not."""


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Let Megatron-Core find no `wandb`: importing it takes 4 s, in every process of every run."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


def deactivate() -> None:
    """Undo every patch of `activate`, in reverse order. Does nothing on a GPU."""
    if _applied:
        release_freed_memory()
    while _applied:
        _applied.pop().undo()


def _cuda(backend: Literal["auto", "nccl", "gloo"]) -> Platform:
    if backend == "gloo":
        fix = "to run on the CPU, hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        raise UsageError("--distributed-backend", backend, "nccl or auto on a GPU", fix)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.index >= torch.cuda.device_count():
        expected = f"< {torch.cuda.device_count()}, the GPUs of this node"
        raise UsageError("environment variable LOCAL_RANK", device.index, expected)
    torch.cuda.set_device(device)
    return Platform(kind="cuda", device=device, backend="nccl", patches=())


def _apply_all() -> None:
    try:
        for kind in patches_of(installed_release()):
            patch = kind()
            # Listed before it is applied: half of a patch can be undone, but must not be left.
            _applied.append(patch)
            patch.apply()
    except BaseException:
        deactivate()
        raise


def check_requirements() -> None:
    """Check the version of Megatron-Core, and the packages that it finds by name.

    Raises:
        UsageError: Megatron-Core is missing or of another version; `psutil` is missing; a package
            that is not NVIDIA's Apex is installed under the name `apex`; or Transformer Engine is
            installed without its libraries.
    """
    installed_release()
    _check_psutil()
    _check_apex()
    check_installation()


def _check_psutil() -> None:
    # Without it, Megatron-Core's writer of distributed checkpoints waits forever, without an error.
    if importlib.util.find_spec("psutil") is None:
        raise UsageError("package psutil", "missing", "installed", "pip install psutil")


def _check_apex() -> None:
    # Recognised by its files: importing an unknown package to identify it would run its code.
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "multi_tensor_apply" / "__init__.py").is_file() for place in places):
        raise UsageError(
            "package apex",
            str(places[0] if places else spec.origin),
            "NVIDIA's Apex built from source, or none",
            "the apex on the package index is another project: pip uninstall apex",
        )
