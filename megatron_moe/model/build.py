"""From our configuration to Megatron-Core's, and from that to the model chunks of one rank."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from fused_kernels.operations import Kernels, RmsNorm
from megatron_moe.config import ModelConfig, PrecisionConfig, RunConfig, moe_layer_pattern
from megatron_moe.model.attention import RotaryCoreAttention
from megatron_moe.model.fp8 import emulate_fp8
from megatron_moe.model.implementation import Implementation, implementation
from megatron_moe.model.layer import OpenMoELayer, OpenMoELayerSubmodules
from megatron_moe.model.logical import expert_width
from megatron_moe.model.norm import RMSNorm, SplitRMSNorm
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.shards import initialise
from megatron_moe.model.te_scales import make_scales
from megatron_moe.moe.registry import kernels_for
from megatron_moe.platform.transformer_engine import choose_impl


class Degrees(Protocol):
    """The degrees of parallelism that a model is built for; `parallel.Layout` has them."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""

    @property
    def pp(self) -> int:
        """Pipeline stages."""

    @property
    def vp(self) -> int | None:
        """Chunks per stage, ``None`` without interleaving."""

    @property
    def chunk_layers(self) -> tuple[int, ...]:
        """Layers of every model chunk, in the order of the model."""

    @property
    def ep(self) -> int:
        """Expert-parallel size."""

    @property
    def etp(self) -> int:
        """Expert tensor-parallel size."""


def transformer_config(
    config: RunConfig, degrees: Degrees, device: torch.device, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron-Core's configuration of our model.

    Initialisation is off: `initialise` fills every parameter from the seed and its logical name, so
    that the weights do not depend on the layout.
    """
    model = config.model
    core = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        kv_channels=model.kv_channels,
        # Makes Megatron-Core sum the gradients of the norms of queries and keys over
        # tensor-parallel ranks: right for one weight for all heads, wrong for one that is split.
        qk_layernorm=model.qk_layernorm and model.qk_layernorm_scope == "head",
        softmax_scale=model.softmax_scale,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        # Frees an output once its send is posted. NCCL keeps the memory until it has been read;
        # gloo does not, and an overlapped send would read memory that holds other data by then.
        deallocate_pipeline_outputs=device.type == "cuda",
        gradient_accumulation_fusion=config.parallel.gradient_accumulation_fusion,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **_expert_settings(config),
        **fp8_settings(config.precision),
        **_layout_settings(config, degrees),
    )
    core.rotary_base = model.rotary_base  # type: ignore[attr-defined]
    return core


def _expert_settings(config: RunConfig) -> dict[str, Any]:
    """Settings of the experts; none if no layer has any."""
    pattern = moe_layer_pattern(config.moe.moe_layer_freq, config.model.num_layers)
    if not any(pattern):
        return {}
    return {
        "num_moe_experts": config.moe.num_experts,
        "moe_layer_freq": [int(is_moe) for is_moe in pattern],
        "moe_router_topk": config.moe.moe_router_topk,
        # Megatron-Core rejects one choice per token without this, although it is for its own
        # router, which we do not use.
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": expert_width(config.model, config.moe),
        "moe_token_dispatcher_type": "alltoall",
    }


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Settings of FP8 for layers of Transformer Engine; none without FP8."""
    if precision.fp8_format is None or precision.fp8_emulate:
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _layout_settings(config: RunConfig, degrees: Degrees) -> dict[str, Any]:
    parallel = config.parallel
    selective = parallel.recompute_granularity == "selective"
    return {
        "tensor_model_parallel_size": degrees.tp,
        "pipeline_model_parallel_size": degrees.pp,
        "virtual_pipeline_model_parallel_size": degrees.vp,
        "pipeline_model_parallel_layout": _stage_layout(degrees),
        "expert_model_parallel_size": degrees.ep,
        "expert_tensor_parallel_size": degrees.etp,
        "sequence_parallel": parallel.sequence_parallel and degrees.tp > 1,
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        # Our experts never keep their gated product; Megatron-Core asks for its own grouped GEMMs.
        "recompute_modules": [m for m in parallel.recompute_modules if m != "moe_act"]
        if selective
        else None,
    }


def _stage_layout(degrees: Degrees) -> list[list[str]] | None:
    """What each model chunk holds in Megatron-Core's words; `None` if all have as many layers."""
    if len(set(degrees.chunk_layers)) == 1:
        return None
    chunks = [["decoder"] * count for count in degrees.chunk_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def layer_spec(
    config: RunConfig, pgs: ProcessGroupCollection, layers: Implementation, kernels: Kernels
) -> ModuleSpec:
    """How Megatron-Core's block builds one of our layers."""
    model, norm = config.model, kernels.rms_norm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=layers.column,
            core_attention=ModuleSpec(RotaryCoreAttention, params={"kernel": kernels.rotary}),
            linear_proj=layers.row,
            q_layernorm=_qk_norm(model, model.num_attention_heads, pgs, norm),
            k_layernorm=_qk_norm(model, model.key_value_heads, pgs, norm),
        ),
    )
    return ModuleSpec(
        module=OpenMoELayer,
        params={"model": model, "moe": config.moe},
        submodules=OpenMoELayerSubmodules(self_attention=attention, layers=layers),
    )


def _qk_norm(
    model: ModelConfig, heads: int, pgs: ProcessGroupCollection, kernel: RmsNorm
) -> ModuleSpec | None:
    """The norm of queries or keys, of which all ranks together have ``heads`` heads."""
    if not model.qk_layernorm:
        return None
    if model.qk_layernorm_scope == "head":
        return ModuleSpec(module=RMSNorm, params={"kernel": kernel})
    return ModuleSpec(module=SplitRMSNorm, params={"heads": heads, "tp_group": pgs.tp})


def build_model(
    config: RunConfig,
    degrees: Degrees,
    pgs: ProcessGroupCollection,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[OpenMoEModel]:
    """The chunks of this rank, on ``device``, with their initial weights.

    Args:
        config: the run.
        degrees: the layout, already validated.
        pgs: process groups of that layout.
        vocab_size: padded vocabulary V, a multiple of the tensor-parallel size.
        device: where parameters live.
        dtype: type of parameters; ``None`` means bf16 with `--bf16`, else fp32.

    Returns:
        One chunk, or as many as the interleaved schedule has per stage.

    Raises:
        UsageError: `--transformer-impl` asks for layers that cannot run on ``device``.
    """
    if dtype is None:
        dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    core = transformer_config(config, degrees, device, dtype)
    kernels = kernels_for(config.moe, device.type)
    layers = implementation(choose_impl(config, device.type).name)
    spec = layer_spec(config, pgs, layers, kernels)
    stage, stages = pgs.pp.rank(), degrees.pp
    numbers = range(degrees.vp) if degrees.vp else [None]
    chunks = [
        OpenMoEModel(
            core,
            spec,
            config.model,
            vocab_size,
            first=stage == 0 and not number,
            last=stage == stages - 1 and number in (None, (degrees.vp or 1) - 1),
            pgs=pgs,
            loss_kernel=kernels.linear_cross_entropy,
            logits_chunk_tokens=config.parallel.logits_chunk_tokens,
            vp_stage=number,
            norm=ModuleSpec(module=RMSNorm, params={"kernel": kernels.rms_norm}),
            layers_need_tokens=config.moe.moe_router_type == "token_hash",
        )
        for number in numbers
    ]
    if device.type != "cpu":
        chunks = [chunk.to(device) for chunk in chunks]
    if config.precision.fp8_emulate:
        emulate_fp8(chunks, config, device)
    else:
        make_scales(chunks, config)
    initialise(chunks, config, vocab_size)
    return chunks
