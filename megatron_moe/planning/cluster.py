"""What a cluster can do: GPU, links inside and between nodes, with the source of each figure.

Shipped profiles are the TOML files of `planning/clusters/`. A file of one's own has the same keys.
A figure that is measured on the cluster (`nccl-tests`, a GEMM benchmark) is better than a published
one.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.text import read_text, toml_value

PROFILES = Path(__file__).parent / "clusters"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal nodes."""

    name: str
    gpu: str
    """As printed."""
    memory_gb: float
    """Memory of a GPU, 10^9 bytes."""
    reserved_gb: float
    """Of that, not for tensors: CUDA context, buffers of NCCL, fragmentation."""
    bf16_tflops: float
    """Dense peak of bf16."""
    fp32_tflops: float
    """Dense peak of fp32 without TF32."""
    fp8_tflops: float
    """Dense peak of fp8; 0 without."""
    gemm_efficiency: float
    """Largest share of the peak that a large matrix product reaches."""
    attention_efficiency: float
    """The same of fused attention."""
    memory_bandwidth: float
    """GB/s of the GPU's memory."""
    memory_efficiency: float
    """Share of it that elementwise kernels reach."""
    multiprocessors: int
    """Tiles of a matrix product that run at once."""
    kernel_microseconds: float
    """Least time between the starts of two kernels."""
    gpus_per_node: int
    intra_bandwidth: float
    """GB/s that a GPU sends to the others of its node, as collectives reach it."""
    intra_microseconds: float
    """Latency of a collective inside a node."""
    inter_bandwidth: float
    """GB/s that a GPU sends to other nodes, through its share of the network cards, as reached."""
    inter_microseconds: float
    """Latency of a collective between nodes, for each doubling of the nodes."""
    node_kilowatts: float
    """Largest power of a node."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where each figure is from, by its name."""

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of `bf16`, `fp32` or `fp8`."""
        return 1e12 * float(getattr(self, f"{precision}_tflops"))

    @property
    def usable_bytes(self) -> int:
        """Bytes of a GPU for tensors."""
        return int(1e9 * (self.memory_gb - self.reserved_gb))


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_cluster(name: str, changes: dict[str, Any] | None = None) -> Cluster:
    """A shipped profile by name, or a file that ends in `.toml`.

    Args:
        name: of the profile or the file.
        changes: figures to replace.

    Raises:
        UsageError: there is no such profile or file, a key is unknown or missing, or a figure is
            not a positive number.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    if not name.endswith(".toml") and name not in profile_names():
        expected = f"one of {', '.join(profile_names())}, or a .toml file"
        raise UsageError("--cluster", name, expected)
    try:
        values = toml_value(read_text(path, "--cluster", "a readable TOML file"))
    except ValueError as error:
        raise UsageError("--cluster", str(path), "a TOML file", str(error)) from None
    values = {**values, **(changes or {})}
    hints = typing.get_type_hints(Cluster)
    for key in values:
        if key not in hints:
            raise UsageError(f"key of {path.name}", key, f"one of {', '.join(hints)}")
    for key, hint in hints.items():
        if key == "sources":
            continue
        if key not in values:
            raise UsageError(f"{key} of {path.name}", None, "given")
        if hint is str:
            continue
        least = 0 if key in ("fp8_tflops", "reserved_gb") else 1e-9
        kinds = (int,) if hint is int else (int, float)
        if type(values[key]) not in kinds or not least <= values[key] < 1e9:
            kind = "a positive integer" if hint is int else "a positive number"
            raise UsageError(f"{key} of {path.name}", values[key], kind)
    if not isinstance(values.get("sources", {}), dict):
        raise UsageError(f"sources of {path.name}", values["sources"], "a table")
    if values["reserved_gb"] >= values["memory_gb"]:
        expected = f"less than memory_gb ({values['memory_gb']})"
        raise UsageError(f"reserved_gb of {path.name}", values["reserved_gb"], expected)
    return Cluster(**values)
