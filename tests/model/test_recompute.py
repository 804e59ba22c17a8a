"""What recomputation of each module frees: measured, against the formulas of `docs/training.md`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_moe.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_moe.model.build import build_model
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from tests.support.pool import Pool

ROWS, SEQ, VOCAB = 2, 128, 256
TOKENS = ROWS * SEQ
HIDDEN, HEADS, CHANNELS = 64, 4, 24
FFN, EXPERT, SHARED = 160, 96, 112
EXPERTS, TOPK, SLOTS = 4, 2, 40
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        kv_channels=CHANNELS,
        max_position_embeddings=SEQ,
    ),
    moe=MoEConfig(
        num_experts=EXPERTS,
        moe_layer_freq="[0,1]",
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=EXPERT,
        moe_shared_expert_intermediate_size=SHARED,
        # t5x: round(1.25 * 128 / 4) slots for each row.
        moe_expert_capacity_factor=1.25,
        moe_expert_impl="batched",
        moe_dispatch_impl="reference",
    ),
    data=DataConfig(seq_length=SEQ, vocab_size=VOCAB, make_vocab_size_divisible_by=1),
    train=TrainConfig(micro_batch_size=ROWS, train_iters=1),
)
"""One dense layer and one MoE layer, with three blocks in each feed-forward: linear, gate, up."""


def saved_bytes(rank: int, world_size: int, *, modules: tuple[str, ...]) -> int:
    """Bytes that wait for the backward pass, each storage once, without the parameters."""
    parallel = ParallelConfig()
    if modules:
        parallel = replace(parallel, recompute_granularity="selective", recompute_modules=modules)
    config = replace(CONFIG, parallel=parallel)
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    (chunk,) = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    held: list[torch.Tensor] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    ids = torch.arange(TOKENS).view(ROWS, SEQ) % VOCAB
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = chunk(ids, ids).sum()
    kept = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    for module in chunk.modules():
        # Angles of the rotary embedding stay, whatever is recomputed.
        kept |= {
            t.untyped_storage().data_ptr() for t in (getattr(module, "_table", None) or ())[1:]
        }
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    total = sum(size for place, size in storages.items() if place not in kept)
    loss.backward()
    return total


def kept_without_recomputation() -> int:
    """The sum of the table in `docs/training.md` over both layers, the final norm and the loss."""
    inner, rows = HEADS * CHANNELS, EXPERTS * ROWS * SLOTS
    norm = 2 * HIDDEN + 1
    attention = norm + 4 * inner + HEADS
    layers = 2 * attention + norm + 4 * FFN + norm + norm + 4 * SHARED
    experts = rows * (2 * HIDDEN + 3 * EXPERT) + TOKENS * (EXPERTS + 1)
    return 4 * (TOKENS * (layers + norm + VOCAB) + experts)


def freed(modules: tuple[str, ...]) -> int:
    """The formulas of `docs/training.md`, with fp32 activations (b = 4)."""
    buffer = EXPERTS * ROWS * SLOTS
    parts = {
        # Norms before attention (2), feed-forwards (2) and the shared expert, with 1 / rms.
        "layernorm": 5 * TOKENS * (HIDDEN + 1),
        # The softmax's sum: queries and keys stay as projected instead of rotated.
        "core_attn": 2 * TOKENS * HEADS,
        "ffn": TOKENS * 4 * FFN,
        "shared_experts": TOKENS * 4 * SHARED,
        # Rows in and out, the gate's input; of the router, probabilities and log Z.
        "moe": buffer * (2 * HIDDEN + 3 * EXPERT) + TOKENS * (EXPERTS + 1),
        "moe_act": 0,
    }
    parts["mlp"] = parts.pop("ffn") + parts["shared_experts"]
    return 4 * sum(parts[name] for name in modules)


@pytest.mark.parametrize(
    "modules",
    [
        ("layernorm",),
        ("core_attn",),
        ("mlp",),
        ("shared_experts",),
        ("moe",),
        ("moe_act",),
        ("core_attn", "layernorm", "mlp", "moe"),
    ],
    ids="-".join,
)
def test_modules_free_what_the_formula_says(pool: Pool, modules: tuple[str, ...]) -> None:
    before, after = (pool.run(saved_bytes, 1, modules=names)[0] for names in ((), modules))
    assert before - after == pytest.approx(freed(modules), rel=0.05)


def test_a_pass_keeps_what_the_formula_says(pool: Pool) -> None:
    assert pool.run(saved_bytes, 1, modules=())[0] == pytest.approx(
        kept_without_recomputation(), rel=0.05
    )
