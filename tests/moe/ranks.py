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

from megatron_moe.config import ParallelConfig, RunConfig, TrainConfig
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


def check_layout(
    rank: int, world_size: int, *, tp: int, ep: int, etp: int, settings: dict[str, Any]
) -> int:
    """The body of one rank; the number of choices dropped on it."""
    ctx = context_of(world_size, tp, ep, etp)
    set_loss_scale(0.5)
    whole = run_whole(settings, ctx.layout.dp)
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs, sequence_parallel=tp > 1)
    copy_experts(layer, whole.layer, ctx)
    seen = watched(layer)
    x = tokens(ctx.dp_rank).chunk(tp)[ctx.tp_rank].clone().requires_grad_()
    y = layer(x, padding(ctx.dp_rank).chunk(tp)[ctx.tp_rank])
    y.backward(tokens(100 + ctx.dp_rank).chunk(tp)[ctx.tp_rank])
    kept = seen[0].kept_TK.view(SEQUENCE // tp, BATCH, -1)
    assert torch.equal(kept, whole.kept[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    torch.testing.assert_close(y, whole.outputs[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    torch.testing.assert_close(x.grad, whole.input_grads[ctx.dp_rank].chunk(tp)[ctx.tp_rank])
    check_weight_gradients(layer, whole.layer, ctx)
    check_statistics(layer, whole.layer, ctx)
    return int((~kept).sum())


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
        wrapped(tokens(ctx.dp_rank)).backward(tokens(100 + ctx.dp_rank))
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
