"""What one rank of a layout does in the multi-rank tests: run its part, hold it against the whole.

Each rank also runs the layer in one process, with all experts, on the tokens of every data-parallel
rank, and compares its own part of the outputs, drops, input gradients and reduced weight gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_moe.moe import MoELayer, collect_statistics
from megatron_moe.parallel.context import ParallelContext, initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from tests.moe.cases import (
    BATCH,
    SEQUENCE,
    layer_of,
    model_config,
    moe_config,
    set_loss_scale,
    tokens,
    watched,
)


@dataclass
class Whole:
    """The one-process results, per data-parallel rank and summed."""

    outputs: list[Tensor]
    kept: list[Tensor]
    input_grads: list[Tensor]
    layer: MoELayer


def context_of(world_size: int, tp: int, ep: int, etp: int) -> ParallelContext:
    """Process groups of a layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model = model_config()
    train = TrainConfig(micro_batch_size=1, global_batch_size=8, train_iters=1)
    config = RunConfig(model=model, moe=moe_config(), parallel=parallel, train=train)
    layout = resolve_layout(config, world_size)
    return initialize_parallel(layout, parallel, activate(), seed=1)


def run_whole(settings: dict[str, Any], replicas: int) -> Whole:
    """One process, every data-parallel rank's tokens in turn; gradients add up."""
    layer = layer_of(moe_config(**settings))
    seen = watched(layer)
    outputs, grads = [], []
    for replica in range(replicas):
        x = tokens(replica).requires_grad_()
        y = layer(x, padding(replica))
        y.backward(tokens(100 + replica))
        outputs.append(y.detach())
        grads.append(x.grad)
    return Whole(outputs, [r.kept_TK.view(SEQUENCE, BATCH, -1) for r in seen], grads, layer)


def padding(replica: int) -> Tensor:
    """The ends of the rows, of another length in each."""
    ends = torch.tensor([SEQUENCE - 1 - replica, SEQUENCE // 2])
    return torch.arange(SEQUENCE)[:, None] >= ends[None, :BATCH]


def copy_experts(layer: MoELayer, whole: MoELayer, ctx: ParallelContext) -> None:
    with torch.no_grad():
        layer.router.weight.copy_(whole.router.weight)
        for name in ("weight_in", "weight_out"):
            full = getattr(whole.experts, name)
            getattr(layer.experts, name).copy_(own_part(name, full, ctx))


def own_part(name: str, full: Tensor, ctx: ParallelContext) -> Tensor:
    """This rank's experts, and its part of their width in each block of the first matrix."""
    mine = full.chunk(ctx.layout.ep)[ctx.ep_rank]
    if name == "weight_out":
        return mine.chunk(ctx.layout.etp, dim=1)[ctx.etp_rank]
    parts = [block.chunk(ctx.layout.etp, dim=2)[ctx.etp_rank] for block in mine.chunk(3, dim=2)]
    return torch.cat(parts, dim=2)


def check_deepep(rank: int, world_size: int, *, tp: int, ep: int, settings: dict[str, Any]) -> int:
    """`check_layout` with DeepEP's exchange over gloo, against all-to-all's one process."""
    from megatron_moe.moe.dispatchers import deepep
    from tests.moe import fake_deep_ep

    before = deepep.fused_exchange
    deepep.fused_exchange = lambda: (fake_deep_ep.fused_dispatch, fake_deep_ep.fused_combine)
    whole = {**settings, "moe_token_dispatcher_type": "alltoall"}
    try:
        return check_layout(
            rank, world_size, tp=tp, ep=ep, etp=1, settings=settings, whole_settings=whole
        )
    finally:
        deepep.fused_exchange = before


def check_layout(
    rank: int,
    world_size: int,
    *,
    tp: int,
    ep: int,
    etp: int,
    settings: dict[str, Any],
    whole_settings: dict[str, Any] | None = None,
) -> int:
    """The body of one rank; the number of choices of real tokens dropped on it.

    Args:
        rank: of this process.
        world_size: ranks.
        tp: tensor-parallel size.
        ep: expert-parallel size.
        etp: expert-tensor-parallel size.
        settings: of the layer.
        whole_settings: of the layer in one process, if they differ.
    """
    ctx = context_of(world_size, tp, ep, etp)
    set_loss_scale(0.5)
    whole = run_whole(whole_settings or settings, ctx.layout.dp)
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs, sequence_parallel=tp > 1)
    copy_experts(layer, whole.layer, ctx)
    seen = watched(layer)
    x = tokens(ctx.dp_rank).chunk(tp)[ctx.tp_rank].clone().requires_grad_()
    pads = padding(ctx.dp_rank).chunk(tp)[ctx.tp_rank]
    y = layer(x, pads)
    y.backward(tokens(100 + ctx.dp_rank).chunk(tp)[ctx.tp_rank])
    kept = seen[0].kept_TK.view(SEQUENCE // tp, BATCH, -1)
    assert torch.equal(kept, whole.kept[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    torch.testing.assert_close(y, whole.outputs[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    torch.testing.assert_close(x.grad, whole.input_grads[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    check_weight_gradients(layer, whole.layer, ctx)
    check_statistics(layer, whole.layer, ctx)
    return int((~kept[~pads]).sum())


def check_overflow(rank: int, world_size: int, *, settings: dict[str, Any]) -> int:
    """With a bounded buffer over EP 2: the choices of this rank that have a row, and their sum.

    Returns the number of choices that overflow on this rank.
    """
    ctx = context_of(world_size, tp=1, ep=2, etp=1)
    whole = layer_of(moe_config(**settings))
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs)
    copy_experts(layer, whole, ctx)
    seen = watched(layer)
    x = tokens(ctx.dp_rank).requires_grad_()
    y = layer(x)
    scores, kept = seen[0].scores, seen[0].kept_TK
    # Rows of the micro-batch take turns, all first choices of both before all second ones.
    room = [SEQUENCE * BATCH * 2 // 2] * 2
    for k in range(2):
        for token in range(SEQUENCE * BATCH):
            target = int(scores.choices_TK[token, k]) // 2
            assert bool(kept[token, k]) == (room[target] > 0), (token, k)
            room[target] -= 1
    alone_TEH = torch.stack([one_expert(x.flatten(0, 1), e, whole) for e in range(4)], 1)
    weight_TK = (scores.weights_TK * kept).unsqueeze(-1)
    chosen_TKH = alone_TEH.gather(1, scores.choices_TK[..., None].expand(-1, -1, x.shape[-1]))
    expected = (weight_TK * chosen_TKH).sum(1).view_as(y)
    torch.testing.assert_close(y, expected)
    grad = tokens(100 + ctx.dp_rank)
    (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    torch.testing.assert_close(ours, *torch.autograd.grad(expected, x, grad))
    overflowed = (~kept).sum()
    dist.all_reduce(overflowed)
    assert collect_statistics([layer], ctx.pgs)[3].dropped_choices == overflowed
    return int((~kept).sum())


def one_expert(x_TH: Tensor, expert: int, layer: MoELayer) -> Tensor:
    """Tokens through one expert of three input blocks, by the formula."""
    linear, gate, up = (x_TH @ layer.experts.weight_in[expert]).chunk(3, dim=-1)
    return (linear * torch.nn.functional.silu(gate) * up) @ layer.experts.weight_out[expert]


def _overlapping(ctx: ParallelContext, dtype: torch.dtype, chunks: int) -> tuple[MoELayer, Tensor]:
    """A layer of 4 experts, 64 x 48, and this rank's 48 x 2 tokens."""
    model = ModelConfig(hidden_size=64, ffn_hidden_size=48)
    moe = moe_config(moe_expert_impl="batched", moe_a2a_overlap_chunks=chunks)
    layer = MoELayer(
        model, moe, layer_number=3, num_moe_layers=2, pgs=ctx.pgs, params_dtype=dtype,
        sequence_parallel=ctx.layout.tp > 1,
    )  # fmt: skip
    layer.reset_parameters(0)
    torch.manual_seed(ctx.dp_rank)
    whole = torch.randn(48, 2, 64).to(dtype)
    return layer, whole.chunk(ctx.layout.tp)[ctx.tp_rank].clone().requires_grad_()


def check_overlap(rank: int, world_size: int, *, tp: int, chunks: int) -> None:
    """Exchanges in chunks against exchanges in one piece, over EP 2."""
    ctx = context_of(world_size, tp=tp, ep=2, etp=1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = []
        for number in (1, chunks):
            layer, x = _overlapping(ctx, dtype, number)
            assert layer.overlaps == (number > 1)
            scale = torch.tensor(3.0, dtype=dtype, requires_grad=True)
            y = layer(x, beside=lambda x=x, scale=scale: x.square() * scale)
            leaves = (x, scale, *layer.parameters())
            found.append((y, *torch.autograd.grad(y, leaves, torch.cos(x.detach() * 3))))
        for one, several in zip(*found, strict=True):
            assert one.abs().max() > 0
            assert torch.equal(one, several), dtype


def overlap_timeline(rank: int, world_size: int, *, chunks: int) -> list[str]:
    """The steps of one forward and backward pass, in the order of the calls."""
    ctx = context_of(world_size, tp=1, ep=2, etp=1)
    layer, x = _overlapping(ctx, torch.float32, chunks)
    steps: list[str] = []
    layer.groups.clock.record = steps.append

    class Shared(torch.autograd.Function):
        """A stand-in for the shared expert that notes when it runs."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            steps.append("shared expert")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            steps.append("gradient of the shared expert")
            return grads[0]

    layer(x, beside=lambda: Shared.apply(x)).sum().backward()
    return steps


def check_weight_gradients(layer: MoELayer, whole: MoELayer, ctx: ParallelContext) -> None:
    """Reduced as Megatron-Core reduces them, without its division by the data-parallel size."""
    router = layer.router.weight.grad
    for group in (ctx.pgs.tp, ctx.pgs.dp):
        dist.all_reduce(router, group=group)
    torch.testing.assert_close(router, whole.router.weight.grad)
    dense = ctx.pgs.dp
    for name in ("weight_in", "weight_out"):
        weight = getattr(layer.experts, name)
        dist.all_reduce(weight.grad, group=dense if weight.allreduce else ctx.pgs.expt_dp)
        expected = own_part(name, getattr(whole.experts, name).grad, ctx)
        torch.testing.assert_close(weight.grad, expected)


def check_statistics(layer: MoELayer, whole: MoELayer, ctx: ParallelContext) -> None:
    ours = collect_statistics([layer], ctx.pgs)[3]
    expected = collect_statistics([whole], None)[3]
    for field, value in vars(expected).items():
        torch.testing.assert_close(torch.tensor(getattr(ours, field)), torch.tensor(value))


def check_megatron_wrapper(rank: int, world_size: int) -> None:
    """Through Megatron-Core's data-parallel wrapper, EP 2: the mean over ranks, counted once."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    ctx = context_of(world_size, tp=1, ep=2, etp=1)
    set_loss_scale(1.0)
    whole = run_whole({}, ctx.layout.dp)
    layer = layer_of(moe_config(), pgs=ctx.pgs)
    copy_experts(layer, whole.layer, ctx)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(), layer, pg_collection=ctx.pgs
    )
    wrapped.zero_grad_buffer()
    for _ in range(2):
        wrapped(tokens(ctx.dp_rank), padding(ctx.dp_rank)).backward(tokens(100 + ctx.dp_rank))
    wrapped.finish_grad_sync()
    expected = 2 * whole.layer.router.weight.grad / world_size
    torch.testing.assert_close(layer.router.weight.main_grad, expected)
    for name in ("weight_in", "weight_out"):
        expected = 2 * own_part(name, getattr(whole.layer.experts, name).grad, ctx) / world_size
        torch.testing.assert_close(getattr(layer.experts, name).main_grad, expected)


def needs_sequence_parallel(rank: int, world_size: int) -> str:
    """The error of a layer with tensor parallelism and without sequence parallelism."""
    from megatron_moe.errors import UsageError

    ctx = context_of(world_size, tp=2, ep=1, etp=1)
    try:
        layer_of(moe_config(), pgs=ctx.pgs, sequence_parallel=False)
    except UsageError as error:
        return str(error)
    return "accepted"
