"""Megatron-Core's own training machinery on gloo against plain torch: three AdamW steps.

Gradient buffers, both kinds of optimizer, overlapped reduction and gathering, clipping by the norm
over all ranks, recomputation, bfloat16, and the stock MoE layer with its dispatcher.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform.release import build_from_spec
from tests.platform.test_activation import NO_CUDA
from tests.support import toy
from tests.support.patches import without
from tests.support.pool import Pool, RemoteError

STEPS, LR, CLIP = 3, 1e-2, 0.5
EPS = 1e-2
"""Large, so that rounding in a tiny gradient does not become a whole step the other way."""
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
VPP = "num_layers_per_virtual_pipeline_stage"
SP = {"sequence_parallel": True, ETP: 1}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
GATHER = {**SHARDED, **OVERLAP, "overlap_param_gather": True}


def train(
    rank: int,
    world_size: int,
    *,
    parallel: dict[str, Any],
    ddp: dict[str, Any],
    bf16: bool = False,
    leave_out: str | None = None,
    recompute: bool = False,
) -> list[tuple[float, float]]:
    """(mean loss of this rank's micro-batches or nan, gradient norm) of each step."""
    if leave_out is not None:
        with without(leave_out):
            return train(rank, world_size, parallel=parallel, ddp=ddp, bf16=bf16)
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    dtype = torch.bfloat16 if bf16 else torch.float32
    ctx = toy.context(world_size, **parallel)
    chunks = toy.wrap(ctx, toy.build_chunks(ctx, dtype=dtype, recompute=recompute), **ddp)
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=0.0,
        adam_eps=EPS,
        clip_grad=CLIP,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=ddp.get("use_distributed_optimizer", False),
        overlap_param_gather=ddp.get("overlap_param_gather", False),
        log_num_zeros_in_grad=True,
    )
    optimizer = get_megatron_optimizer(
        config, chunks, use_gloo_process_groups=False, pg_collection=ctx.pgs
    )
    batches = toy.micro_batches(ctx.layout, ctx.dp_rank)
    history = []
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reported = forward_backward(ctx, toy.forward_step, batches, chunks)
        done, norm, _ = optimizer.step()
        assert done
        losses = [float(entry["loss"]) for entry in reported]
        history.append((sum(losses) / len(losses) if losses else float("nan"), float(norm)))
    return history


def twin_history() -> list[tuple[float, float]]:
    model = toy.Twin()
    optimizer = torch.optim.AdamW(model.weights.values(), lr=LR, eps=EPS, weight_decay=0.0)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.weights.values(), CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


def mean_losses(results: list[list[tuple[float, float]]]) -> list[float]:
    """Over the ranks with a loss, by step."""
    steps = zip(*results, strict=True)
    return [float(torch.tensor([loss for loss, _ in step]).nanmean()) for step in steps]


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (1, {}, SHARDED),
    (2, {}, SHARDED),
    (2, {}, GATHER),
    (2, {PP: 2, VPP: 1}, GATHER),
    (2, {TP: 2, **SP}, SHARDED),
    (2, {EP: 2}, {}),
    (4, {TP: 2, EP: 2, **SP}, GATHER),
    (4, {PP: 2, EP: 2}, {**SHARDED, **OVERLAP}),
]


@pytest.mark.parametrize(("world_size", "parallel", "ddp"), CASES)
def test_three_steps_follow_plain_adamw(
    pool: Pool, world_size: int, parallel: dict[str, Any], ddp: dict[str, Any]
) -> None:
    results = pool.run(train, world_size, parallel=parallel, ddp=ddp)
    expected = twin_history()
    assert mean_losses(results) == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    for history in results:
        assert [norm for _, norm in history] == pytest.approx([n for _, n in expected], rel=1e-3)


@pytest.mark.parametrize("ddp", [{}, SHARDED], ids=["whole", "sharded"])
def test_bfloat16_with_fp32_master_weights_follows_fp32(pool: Pool, ddp: dict[str, Any]) -> None:
    results = pool.run(train, 2, parallel={EP: 2}, ddp=ddp, bf16=True)
    assert mean_losses(results) == pytest.approx([loss for loss, _ in twin_history()], rel=3e-2)


def test_recomputation_changes_nothing(pool: Pool) -> None:
    stored = pool.run(train, 2, parallel={TP: 2, **SP}, ddp={})
    again = pool.run(train, 2, parallel={TP: 2, **SP}, ddp={}, recompute=True)
    assert stored == again


@pytest.mark.parametrize(
    ("patch", "ddp", "bf16", "error"),
    [
        ("device-literals", {}, False, NO_CUDA),
        ("tensor-type-names", SHARDED, False, "Wrapped parameters must be one of"),
        ("tensor-type-names", {}, True, "Wrapped parameters must be one of"),
        ("tensor-type-names", {}, False, "AssertionError"),
        ("random-state", {}, False, NO_CUDA),
    ],
)
def test_it_does_not_train_without(
    pool: Pool, patch: str, ddp: dict[str, Any], bf16: bool, error: str
) -> None:
    with pytest.raises(RemoteError, match=error):
        pool.run(train, 1, parallel={}, ddp=ddp, bf16=bf16, leave_out=patch)


def stock_moe(rank: int, world_size: int, *, dropless: bool) -> tuple[float, list[float]]:
    """Sum of outputs and sums of gradients by expert, of Megatron-Core's own MoE layer with EP."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    ctx = toy.context(world_size, **{EP: world_size})
    capacity = {} if dropless else {"moe_expert_capacity_factor": 2.0}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=toy.H,
        num_attention_heads=1,
        num_moe_experts=toy.E,
        moe_router_topk=2,
        moe_ffn_hidden_size=toy.INNER,
        moe_token_dispatcher_type="alltoall",
        moe_pad_expert_input_to_capacity=not dropless,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=world_size,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        **capacity,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=toy.E, moe_grouped_gemm=False)
    layer = build_from_spec(spec, config=config, pg_collection=ctx.pgs)
    layer.router.weight.data.copy_(toy.weight("router", toy.E, toy.H))
    local = toy.E // world_size
    for index, expert in enumerate(layer.experts.local_experts):
        number = rank * local + index
        expert.linear_fc1.weight.data.copy_(toy.weight(f"in{number}", toy.INNER, toy.H))
        expert.linear_fc2.weight.data.copy_(toy.weight(f"out{number}", toy.H, toy.INNER))
    x = toy.weight("x", 8 * toy.E, 1, toy.H).chunk(world_size)[rank]
    output, _ = layer(x)
    output.square().sum().backward()
    grads = [float(e.linear_fc1.weight.grad.square().sum()) for e in layer.experts.local_experts]
    return float(output.square().sum()), grads


@pytest.mark.parametrize("dropless", [True, False])
def test_the_stock_moe_layer_gives_the_same_on_one_and_two_ranks(
    pool: Pool, dropless: bool
) -> None:
    """Its dispatcher passes its splits from one stream to another, and runs the router's GEMM."""
    (one,) = pool.run(stock_moe, 1, dropless=dropless)
    two = pool.run(stock_moe, 2, dropless=dropless)
    assert sum(total for total, _ in two) == pytest.approx(one[0], rel=1e-4)
    assert [g for _, grads in two for g in grads] == pytest.approx(one[1], rel=1e-4)
