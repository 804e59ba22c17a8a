"""How the network is laid out over ranks, whose layers run, what is overlapped and recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_moe.config.fields import AtLeastOne, OmittedAtDefault, Positive

RecomputedModule = Literal["core_attn", "mlp", "moe", "shared_experts", "layernorm", "moe_act"]
TransformerImpl = Literal["local", "transformer_engine"]
"""Whose linear layers and experts run."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel size is what the world size leaves."""

    tensor_model_parallel_size: Annotated[int, AtLeastOne] = 1
    """Ranks that share each attention and dense feed-forward layer."""
    pipeline_model_parallel_size: Annotated[int, AtLeastOne] = 1
    """Pipeline stages."""
    num_layers_per_virtual_pipeline_stage: Annotated[int | None, AtLeastOne] = None
    """Layers of one model chunk of the interleaved pipeline schedule; `None` means one chunk."""
    num_virtual_stages_per_pipeline_rank: Annotated[int | None, AtLeastOne] = None
    """The same as the number of model chunks per rank; give one of the two."""
    decoder_first_pipeline_num_layers: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """Layers of the first pipeline stage; the stages without such a flag share the rest evenly."""
    decoder_last_pipeline_num_layers: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """Layers of the last pipeline stage, which also computes the logits and the loss."""
    account_for_embedding_in_pipeline_split: Annotated[bool, OmittedAtDefault] = False
    """Count the embedding as a layer when layers are divided among pipeline stages."""
    account_for_loss_in_pipeline_split: Annotated[bool, OmittedAtDefault] = False
    """Count the logits and the loss as a layer when layers are divided among pipeline stages."""
    pipeline_model_parallel_layout: Annotated[str | None, OmittedAtDefault] = None
    """What each model chunk holds, in the order of the model: `E` the embedding, `t` a layer, `L`
    the logits and the loss, `|` between chunks, `x*n` and `(...)*n` repeat. Chunk c is on stage
    c % PP, e.g. `Et*3|t*2|t*2|tL`. Sets the chunks per rank as well."""
    expert_model_parallel_size: Annotated[int, AtLeastOne] = 1
    """Ranks over which the experts of a layer are distributed."""
    expert_tensor_parallel_size: Annotated[int | None, AtLeastOne] = None
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
    recompute_num_layers: Annotated[int | None, AtLeastOne] = None
    """The N of `--recompute-method`."""
    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """With `selective`: which modules. `core_attn` is attention between its projections, `mlp`
    dense feed-forward layers and the shared expert, `moe` the other experts with their router,
    `shared_experts` the shared expert alone, `layernorm` the norms before attention and
    feed-forwards. `moe_act`, the gated product of experts, is always computed again."""
    logits_chunk_tokens: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """Tokens of a micro-batch whose logits exist at once. With fewer than a micro-batch has, logits
    are computed again in the backward pass, all but the last chunk's. `None`: as many as 512 MiB of
    fp32 logits, but at least 1024."""
    transformer_impl: Annotated[
        Literal["auto", "local", "transformer_engine"], OmittedAtDefault
    ] = "auto"
    """Linear layers of attention and feed-forwards, and experts. `local`: Megatron-Core's layers
    and this program's experts. `transformer_engine`: those of Transformer Engine, which needs a
    CUDA device. `auto`: Transformer Engine where it can run; the log says which and why."""
    gradient_accumulation_fusion: Annotated[bool, OmittedAtDefault] = False
    """Let GEMMs of linear layers add weight gradients to the gradient buffer, on CUDA devices.
    With `--transformer-impl local` it needs Apex's `fused_weight_gradient_mlp_cuda`; experts
    accumulate in any case."""
    cuda_graph: Annotated[Literal["none", "full"], OmittedAtDefault] = "none"
    """Capture the forward and backward passes of a step and the reduction of gradients in one CUDA
    graph (`full`), which is launched at once instead of kernel by kernel. Settings that change from
    step to step on the host cannot be captured and are errors."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; `auto` is NCCL on GPUs and gloo on CPUs; the choice is logged."""
    distributed_timeout_minutes: Annotated[float, Positive] = 10.0
    """How long a collective may wait before the run is aborted."""
