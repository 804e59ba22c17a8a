"""Grouped-query attention with norms of queries and keys, against Megatron-Core's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, ParallelConfig, RunConfig
from megatron_moe.model.reference.attention import Attention
from megatron_moe.platform.release import build_from_spec
from tests.support.pool import Pool

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=24,
    num_attention_heads=6,
    kv_channels=8,
    group_query_attention=True,
    num_query_groups=2,
    qk_layernorm=True,
    softmax_scale=None,
    norm_epsilon=1e-2,
    rotary_base=100.0,
)
ROWS, LENGTH = 2, 9


def by_megatron_core(rank: int, world_size: int, x_BSH: Tensor, weights: dict[str, Tensor]) -> Any:
    """Output [B, S, H] of its attention, and the gradient of every weight, for sum(output^2)."""
    from megatron_moe.parallel.context import initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.platform import activate

    platform, parallel = activate(), ParallelConfig()
    layout = resolve_layout(RunConfig(parallel=parallel), world_size, None)
    pgs = initialize_parallel(layout, parallel, platform, 1).pgs

    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=MODEL.hidden_size,
        num_attention_heads=MODEL.num_attention_heads,
        num_query_groups=MODEL.num_query_groups,
        kv_channels=MODEL.kv_channels,
        qk_layernorm=True,
        layernorm_epsilon=MODEL.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    attention = build_from_spec(
        spec.submodules.self_attention, config=config, layer_number=1, pg_collection=pgs
    )
    groups, width = MODEL.key_value_heads, MODEL.kv_channels
    fused = [weights[f"{n}.weight"].unflatten(0, (groups, -1)) for n in ("query", "key", "value")]
    with torch.no_grad():
        attention.linear_qkv.weight.copy_(torch.cat(fused, 1).flatten(0, 1))
        attention.linear_proj.weight.copy_(weights["output.weight"])
        attention.q_layernorm.weight.copy_(weights["query_norm.weight"])
        attention.k_layernorm.weight.copy_(weights["key_norm.weight"])
    rotary = RotaryEmbedding(
        width, 1.0, rotary_base=MODEL.rotary_base, use_cpu_initialization=True, cp_group=pgs.cp
    )
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    x_SBH = x_BSH.transpose(0, 1).contiguous()
    y_SBH, _ = attention(x_SBH, attention_mask=mask, rotary_pos_emb=rotary(LENGTH))
    y_SBH.square().sum().backward()
    rows = MODEL.num_attention_heads // groups * width
    split = attention.linear_qkv.weight.grad.unflatten(0, (groups, -1)).split(
        [rows, width, width], 1
    )
    names = ("query.weight", "key.weight", "value.weight")
    grads = {n: part.flatten(0, 1) for n, part in zip(names, split, strict=True)}
    grads["output.weight"] = attention.linear_proj.weight.grad
    grads["query_norm.weight"] = attention.q_layernorm.weight.grad
    grads["key_norm.weight"] = attention.k_layernorm.weight.grad
    return y_SBH.transpose(0, 1).detach(), grads


def test_output_and_gradients_are_megatron_core_s(pool: Pool) -> None:
    generator = torch.Generator().manual_seed(1)
    attention = Attention(MODEL)
    with torch.no_grad():
        for name, weight in attention.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4 + ("norm" in name))
    x_BSH = torch.randn(ROWS, LENGTH, MODEL.hidden_size, generator=generator)
    weights = {name: weight.detach() for name, weight in attention.named_parameters()}
    ((expected, grads),) = pool.run(by_megatron_core, 1, x_BSH=x_BSH, weights=weights)
    found = attention(x_BSH)
    found.square().sum().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == weights.keys()
    for name, weight in attention.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name], rtol=1e-4, atol=1e-4)
