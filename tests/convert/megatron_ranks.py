"""Checkpoints that Megatron-Core itself writes, of its own GPT model; runs on ranks of the pool."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VOCAB, LENGTH, ITERATION = 64, 16, 7
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "kv_channels": 6,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_ffn_hidden_size": 12,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "layernorm_epsilon": 1e-5,
}
ROTARY_BASE = 1000


def arguments(model: dict[str, Any], tied: bool) -> Namespace:
    """What Megatron-LM's training would store as `args` for such a model, among much else."""
    from megatron.core.transformer.enums import AttnBackend

    renamed = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}
    return Namespace(
        **{renamed.get(key, key): value for key, value in model.items()},
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        rotary_base=ROTARY_BASE,
        rotary_percent=1.0,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not tied,
        group_query_attention=model.get("num_query_groups") is not None,
        padded_vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=None,
        # Values that are no plain data: a dtype, an enumeration, a path.
        params_dtype=torch.float32,
        attention_backend=AttnBackend.fused,
        data_cache_path=Path("/data"),
    )


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def save_checkpoint(
    rank: int,
    world_size: int,
    *,
    path: str,
    model: dict[str, Any],
    tied: bool = False,
    tp: int = 1,
    ep: int = 1,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
    args: bool = True,
) -> Tensor:
    """Build the model and save it; returns the logits, with tensor parallelism a share of them."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    parallel = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
    }
    parallel_state.initialize_model_parallel(**parallel, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        **model,
        **parallel,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    network = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        rotary_base=ROTARY_BASE,
        share_embeddings_and_output_weights=tied,
    )
    network.to(dtype).eval()
    _scale(network)
    ids = tokens()
    mask = torch.ones(LENGTH, LENGTH).tril()[None, None] < 0.5
    with torch.no_grad():
        logits: Tensor = network(ids, torch.arange(LENGTH).expand_as(ids), mask)
    state = {"model": network.sharded_state_dict(metadata=metadata), "checkpoint_version": 3.0}
    common = {"args": arguments(model, tied), "iteration": ITERATION} if args else {}
    folder = Path(path) / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save({**state, **common}, str(folder))
    # The pool destroys what is listed there one by one, which fails for groups of this function.
    parallel_state.destroy_model_parallel()
    parallel_state._global_process_group_list = None
    if rank == 0:
        (Path(path) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return logits.float()


@torch.no_grad()
def _scale(network: torch.nn.Module) -> None:
    """Larger weights and scales other than one, so that every tensor matters for the logits."""
    for name, parameter in sorted(network.named_parameters()):
        if "norm" in name:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.mul_(50.0 if "router" in name else 12.0)
