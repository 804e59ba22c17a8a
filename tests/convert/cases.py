"""A small model of the released variant, as a source of conversions."""

from __future__ import annotations

import torch

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.convert.model import LogicalModel, of_tensor
from megatron_moe.model.logical import initial_tensors, logical_parameters

VOCAB = 96
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=3,
        kv_channels=8,
        max_position_embeddings=64,
        rotary_base=500.0,
    ),
    moe=MoEConfig(
        num_experts=4,
        moe_layer_freq="([0]*1+[1])*2",
        moe_shared_expert_intermediate_size=24,
        moe_capacity_rule="port",
        moe_min_capacity=2,
        moe_aux_loss_coeff=0.5,
    ),
)


def model_of(
    config: RunConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 3, step: int = 5
) -> LogicalModel:
    """A model of this configuration with random weights, norm scales included."""
    parameters = logical_parameters(config.model, config.moe, VOCAB)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in initial_tensors(parameters, seed):
        values = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        tensors[name] = of_tensor(values.to(dtype))
    return LogicalModel(
        source="the case", config=config, vocab_size=VOCAB, tensors=tensors, step=step
    )
