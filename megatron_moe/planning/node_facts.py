"""What a rank finds on its node: versions, GPU, links, limits. Nothing is changed.

What cannot be asked (a driver that is not there, no `/sys/class/infiniband`) is left out; what is
wrong with it is decided in `cluster_check`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy", "safetensors")
"""Packages whose versions all ranks must share."""
VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_NVLS_ENABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Variables that all ranks must share."""
_ADAPTERS = Path("/sys/class/infiniband")


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One rank and its node. Plain values, for JSON."""

    rank: int
    local_rank: int
    host: str
    versions: dict[str, str]
    """By package; also `python`, and `cuda`, `nccl` and `driver` where there is a GPU."""
    variables: dict[str, str]
    """Those of `VARIABLES` that are set."""
    gpu: str | None = None
    """Name of this rank's GPU."""
    gpu_bytes: int = 0
    gpus: int = 0
    """GPUs that this process sees."""
    peers: int = 0
    """Other GPUs whose memory this one reads directly."""
    nvlinks: int = 0
    """Active NVLinks of this rank's GPU."""
    adapters: list[str] = field(default_factory=list)
    """Active ports of InfiniBand or RoCE adapters, with their rates."""
    open_files: int = 0
    """Limit of open files and sockets."""
    locked_bytes: int = -1
    """Limit of pinned memory; -1 for none."""

    def to_json(self) -> dict[str, Any]:
        """For a gather."""
        return dataclasses.asdict(self)


def node_facts(rank: int, local_rank: int) -> NodeFacts:
    """Ask this process, its GPU and its kernel."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return NodeFacts(
        rank=rank,
        local_rank=local_rank,
        host=socket.gethostname(),
        versions=_versions(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        adapters=active_adapters(_ADAPTERS),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=-1 if locked == resource.RLIM_INFINITY else locked,
        **_gpu(local_rank),
    )


def active_adapters(folder: Path) -> list[str]:
    """Active ports of the adapters in a folder such as `/sys/class/infiniband`."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, rate = _first_line(port / "state"), _first_line(port / "rate")
        if "ACTIVE" in state:
            found.append(f"{port.parent.parent.name}:{port.name} {rate}")
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _asked(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return {name: version for name, version in found.items() if version}


def _gpu(local_rank: int) -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        return {"gpus": count}
    properties = torch.cuda.get_device_properties(local_rank)
    others = [other for other in range(count) if other != local_rank]
    uuid = f"GPU-{properties.uuid}"
    links = _asked("nvidia-smi", "nvlink", "--status", "--id", uuid, whole=True)
    return {
        "gpus": count,
        "gpu": properties.name,
        "gpu_bytes": properties.total_memory,
        "peers": sum(torch.cuda.can_device_access_peer(local_rank, other) for other in others),
        "nvlinks": active_links(links),
    }


def active_links(status: str) -> int:
    """Lines such as `Link 0: 26.562 GB/s` of `nvidia-smi nvlink --status`; inactive ones differ."""
    return sum("Link " in line and "GB/s" in line for line in status.splitlines())


def _asked(*command: str, whole: bool = False) -> str:
    """What a program prints, or its first line; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if whole else (done.stdout.splitlines() or [""])[0].strip()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
