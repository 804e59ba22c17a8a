"""How the network is laid out over ranks, and what the engine may overlap or recompute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel size is what the world size leaves."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each attention and dense feed-forward layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one model chunk of the interleaved pipeline schedule; `None` means one chunk."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """The same thing, said as the number of chunks per rank; give one of the two."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts of a layer are spread."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; `None` means the tensor-parallel size, as in Megatron-LM."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel layers. MoE with TP needs it."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs; needs the distributed optimizer."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (`full`) or chosen modules (`selective`) in the backward pass."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`: every N layers, or the first N of each stage."""
    recompute_num_layers: int | None = None
    """The N of `--recompute-method`."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] = ("core_attn",)
    """With `selective`: which modules."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; `auto` is NCCL on GPUs and gloo on CPUs, said in the log."""
    distributed_timeout_minutes: float = 10.0
    """How long a collective may wait before the run is ended."""
