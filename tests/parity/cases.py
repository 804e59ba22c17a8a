"""The small model, its data and the layouts that parity tests run.

The model is small but nothing is degenerate: rows per micro-batch, capacity groups, heads, experts
and feed-forward widths are all larger than any degree, capacity is tight enough that both first
and second choices drop, and masks leave a different number of targets in every micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_moe.config.shorthand import split_experts

VOCAB = 96
SEQ = 16
ROWS = 2
GLOBAL_ROWS = 8
TRAIN_SEED = 7
CHUNK = 13
"""Tokens whose logits exist at once: the 32 of a micro-batch are three chunks, of 11, 11 and 10."""


@dataclass(frozen=True)
class Layout:
    """A layout under test: ranks and flags."""

    name: str
    world_size: int
    flags: dict[str, Any]


def _tp(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": size > 1}


_PP2 = {"pipeline_model_parallel_size": 2}
_EP2 = {"expert_model_parallel_size": 2}

LAYOUTS = [
    Layout("1", 1, {}),
    Layout("TP2", 2, {**_tp(2), "expert_tensor_parallel_size": 1}),
    Layout("TP2xETP2", 2, _tp(2)),
    Layout("PP2", 2, _PP2),
    Layout("PP2-interleaved", 2, {**_PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    Layout("PP2-written-out", 2, {**_PP2, "pipeline_model_parallel_layout": "E|tt|t|tL"}),
    Layout("DP2", 2, {}),
    Layout("EP2", 2, _EP2),
    Layout("TP2xEP2", 2, {**_tp(2), **_EP2, "expert_tensor_parallel_size": 1}),
    Layout("PP2xEP2", 4, {**_PP2, **_EP2}),
    Layout("EP2xETP2", 4, {**_EP2, "expert_tensor_parallel_size": 2}),
    Layout("DP2xEP2", 4, _EP2),
    Layout(
        "TP2xEP4", 4, {**_tp(2), "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    ),
]
SLOW_LAYOUTS = [
    Layout("PP2-first-1", 2, {**_PP2, "decoder_first_pipeline_num_layers": 1}),
    Layout("PP2-last-1", 2, {**_PP2, "decoder_last_pipeline_num_layers": 1}),
    Layout(
        "PP2-loss-counts",
        2,
        {
            **_PP2,
            "num_virtual_stages_per_pipeline_rank": 3,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    Layout("PP2xTP2xEP2", 8, {**_PP2, **_tp(2), **_EP2, "expert_tensor_parallel_size": 1}),
    Layout("PP2xTP2xEP2xETP2", 8, {**_PP2, **_tp(2), **_EP2, "expert_tensor_parallel_size": 2}),
]

_MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=24,
    num_attention_heads=4,
    kv_channels=12,
    max_position_embeddings=SEQ,
    logit_z_loss_coeff=1e-2,
    # Other values than our defaults and Megatron-Core's, so that an ignored setting shows.
    norm_epsilon=1e-2,
    rotary_base=100.0,
    init_variance_scale=0.2,
    embedding_init_method_std=0.7,
    # Strong enough that a wrong router gradient shows.
    router_init_method_std=0.3,
    zero_padding_activations=True,
)
_MOE = MoEConfig(
    num_experts=4,
    moe_layer_freq="([0]*1+[1])*2",
    moe_ffn_hidden_size=20,
    moe_shared_expert_intermediate_size=28,
    moe_expert_capacity_factor=1.0,
    moe_aux_loss_coeff=0.05,
    moe_z_loss_coeff=0.02,
    moe_ignore_padding_tokens=False,
)

VARIANTS: dict[str, tuple[ModelConfig, MoEConfig]] = {
    "released": (_MODEL, _MOE),
    "paper-port": (
        replace(_MODEL, ffn_variant="swiglu", untie_embeddings_and_output_weights=False),
        replace(
            _MOE,
            moe_shared_expert_placement="parallel",
            moe_capacity_rule="port",
            moe_expert_capacity_factor=0.6,
            moe_router_load_balancing_type="aux_loss",
        ),
    ),
    "probs-half-row": (
        replace(_MODEL, softmax_scale=None),
        replace(
            _MOE,
            moe_token_drop_policy="probs",
            moe_capacity_group_size=SEQ // 2,
            moe_router_load_balancing_type="group_aux_loss",
        ),
    ),
    "two-row-groups": (
        _MODEL,
        replace(
            _MOE,
            moe_capacity_group_size=2 * SEQ,
            moe_router_load_balancing_type="group_aux_loss",
        ),
    ),
    "megatron": (
        replace(
            _MODEL,
            ffn_variant="swiglu",
            untie_embeddings_and_output_weights=False,
            scale_tied_logits=False,
        ),
        replace(
            _MOE,
            moe_capacity_rule="megatron",
            moe_expert_capacity_factor=0.7,
            moe_router_load_balancing_type="aux_loss",
            moe_loss_convention="megatron",
        ),
    ),
    "dropless": (_MODEL, replace(_MOE, moe_expert_capacity_factor=None)),
    "top-1": (_MODEL, replace(_MOE, moe_router_topk=1, moe_shared_expert_intermediate_size=None)),
    "grouped-head-norm": (
        replace(
            _MODEL,
            group_query_attention=True,
            num_query_groups=2,
            qk_layernorm=True,
            softmax_scale=None,
        ),
        _MOE,
    ),
    # OLMoE's shape: every layer MoE, no shared expert, norms over whole projections.
    "grouped-projection-norm": (
        replace(
            _MODEL,
            ffn_variant="swiglu",
            group_query_attention=True,
            num_query_groups=2,
            qk_layernorm=True,
            qk_layernorm_scope="projection",
            softmax_scale=None,
        ),
        replace(
            _MOE,
            moe_layer_freq="[1]*4",
            moe_shared_expert_intermediate_size=None,
            moe_expert_capacity_factor=None,
        ),
    ),
    # A Llama with norms over heads: without experts, TP may leave the sequence whole.
    "dense-head-norm": (
        replace(
            _MODEL,
            ffn_variant="swiglu",
            group_query_attention=True,
            num_query_groups=2,
            qk_layernorm=True,
            softmax_scale=None,
        ),
        replace(_MOE, moe_layer_freq="[0]*4"),
    ),
    "sigmoid-groups": (
        _MODEL,
        replace(
            _MOE,
            moe_router_score_function="sigmoid",
            moe_router_topk_scaling_factor=1.5,
            moe_router_num_groups=2,
            moe_router_group_topk=1,
            moe_z_loss_over="chosen",
            moe_token_drop_policy="probs",
        ),
    ),
    "random": (_MODEL, replace(_MOE, moe_token_drop_policy="random")),
    "fair": (_MODEL, replace(_MOE, moe_token_drop_policy="fair")),
    "contextual": (
        _MODEL,
        replace(_MOE, moe_router_type="contextual", moe_router_context_decay=0.7),
    ),
    "norm": (
        _MODEL,
        replace(_MOE, moe_router_type="norm", moe_router_norm_rank=3),
    ),
    "document-pools": (_MODEL, replace(_MOE, moe_router_document_pool=(2, 3))),
    "token-hash": (
        _MODEL,
        replace(_MOE, moe_router_type="token_hash", moe_router_pre_softmax=False),
    ),
    "global-and-row": (
        _MODEL,
        replace(
            _MOE,
            moe_router_load_balancing_type=("global_aux_loss", "seq_aux_loss"),
            moe_aux_loss_coeff=(0.07, 0.03),
            moe_z_loss_over="chosen",
            moe_loss_convention="megatron",
        ),
    ),
    "sign-bias": (
        _MODEL,
        replace(_MOE, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.05),
    ),
    "quantile-bias": (
        _MODEL,
        replace(
            _MOE,
            moe_router_score_function="sigmoid",
            moe_router_load_balancing_type="quantile_balancing",
        ),
    ),
    "ignored-pads": (
        replace(_MODEL, zero_padding_activations=False),
        replace(
            _MOE,
            moe_ignore_padding_tokens=True,
            moe_capacity_group_size=SEQ // 2,
            moe_router_load_balancing_type="group_aux_loss",
            moe_token_drop_policy="fair",
            moe_min_capacity=1,
        ),
    ),
    "ignored-pads-of-rows": (
        replace(_MODEL, zero_padding_activations=False),
        replace(_MOE, moe_ignore_padding_tokens=True, moe_min_capacity=2),
    ),
    "ignored-pads-of-batches": (
        _MODEL,
        replace(
            _MOE,
            moe_ignore_padding_tokens=True,
            moe_capacity_rule="port",
            moe_expert_capacity_factor=0.6,
            moe_router_load_balancing_type=("aux_loss", "seq_aux_loss"),
            moe_aux_loss_coeff=(0.05, 0.03),
            moe_token_drop_policy="probs",
            moe_expert_impl="batched",
        ),
    ),
    # More experts in the deep layer; and, under the rule without choices, split in two.
    "experts-by-layer": (
        _MODEL,
        replace(
            _MOE,
            num_experts=8,
            moe_layer_num_experts=(4, 8),
            moe_layer_capacity_factors=(0.8, 1.2),
        ),
    ),
    "experts-by-layer-bias": (
        _MODEL,
        replace(
            _MOE,
            num_experts=8,
            moe_layer_num_experts=(8, 4),
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.05,
            moe_router_type="contextual",
        ),
    ),
    "split-experts": (_MODEL, split_experts(_MOE, 2, 24)),
    # What GPUs run: one batched GEMM over the fixed-shape buffer.
    "batched": (_MODEL, replace(_MOE, moe_expert_impl="batched")),
    # Exchanges in chunks, beside a parallel shared expert.
    "overlapped": (
        _MODEL,
        replace(
            _MOE,
            moe_expert_impl="batched",
            moe_a2a_overlap_chunks=3,
            moe_shared_expert_placement="parallel",
        ),
    ),
    # Grouped GEMMs over packed rows, with room for all choices on each of two ranks.
    "bounded": (
        _MODEL,
        replace(
            _MOE,
            moe_expert_impl="grouped",
            moe_expert_capacity_factor=None,
            moe_dropless_buffer_factor=2.0,
        ),
    ),
}

ROUTERS = ("sigmoid-groups", "contextual", "token-hash", "norm", "document-pools")
"""Variants of the router, which `test_routers.py` runs."""
OF_THE_STEP = ("global-and-row",)
"""Those whose loss depends on the micro-batches before, and so on the data-parallel size."""
STATEFUL = ("sign-bias", "quantile-bias", "experts-by-layer-bias")
"""Those whose state changes with each step, which it trains for a few."""
GROUPED = ("grouped-head-norm", "grouped-projection-norm")
"""Grouped-query attention, with each form of the norms of queries and keys."""


NUMBERS = ("experts-by-layer", "split-experts")
"""Other numbers of experts."""
DROPS = ("random", "fair")
"""Drop policies that draw."""
IGNORING = ("ignored-pads", "ignored-pads-of-rows", "ignored-pads-of-batches")
"""Padding that is not routed: balanced by group, by row and by micro-batch."""


def run_config(variant: str, flags: dict[str, Any], **train: Any) -> RunConfig:
    """The configuration of one variant under one layout."""
    model, moe = VARIANTS[variant]
    return RunConfig(
        model=model,
        moe=moe,
        parallel=ParallelConfig(**{"logits_chunk_tokens": CHUNK, **flags}),
        data=DataConfig(seq_length=SEQ, vocab_size=VOCAB, make_vocab_size_divisible_by=1),
        train=TrainConfig(
            micro_batch_size=ROWS,
            global_batch_size=GLOBAL_ROWS,
            train_iters=1,
            seed=TRAIN_SEED,
            **train,
        ),
    )


EOD = 0
"""The most frequent id: a row has several documents, some of a single token."""
PLANES = ("positions", "documents")


def document_planes(tokens: Tensor, extra: tuple[str, ...]) -> dict[str, Tensor]:
    """Positions and documents of rows whose documents end with `EOD`, token by token.

    And padding of 0 to `SEQ` - 1 tokens at the end of a row, a number that differs between rows.
    """
    planes = {name: torch.zeros_like(tokens) for name in (*PLANES, "padding")}
    for row, ids in enumerate(tokens.tolist()):
        position = document = 0
        for place, token in enumerate(ids):
            planes["positions"][row, place] = position
            planes["documents"][row, place] = document
            position += 1
            if token == EOD:
                position, document = 0, document + 1
        planes["padding"][row, SEQ - sum(ids) % SEQ :] = 1
    return {f"{name}_BS": planes[name] for name in extra}


def global_batch(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask of one step, each [GLOBAL_ROWS, SEQ]."""
    generator = torch.Generator().manual_seed(seed)
    # A skewed distribution, so that experts fill unevenly.
    weights = torch.arange(1, VOCAB + 1, dtype=torch.float32).reciprocal()
    ids = torch.multinomial(weights.expand(GLOBAL_ROWS, -1), SEQ + 1, True, generator=generator)
    keep = torch.rand(GLOBAL_ROWS, 1, generator=generator)
    mask = (torch.rand(GLOBAL_ROWS, SEQ, generator=generator) < keep).float()
    mask[:, 0] = 1.0
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask
