"""Functions that run on the ranks of the pool: the memory of a real step, and its collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.data.batch import Batch
from megatron_moe.model.build import build_model
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.planning.collective_log import CollectiveLog
from megatron_moe.planning.live_memory import LiveMemory
from megatron_moe.platform import activate
from megatron_moe.training.optim.build import chained_optimizers
from megatron_moe.training.plan import resolve_plan
from megatron_moe.training.run import TrainingRun, prepare_run
from megatron_moe.training.step import train_step

VOCAB = 1024
_LINE = (
    "--preset openmoe-tiny-released --num-layers 4 --moe-layer-freq [0,1]*2 --hidden-size 64 "
    "--ffn-hidden-size 128 --num-attention-heads 4 --kv-channels 24 --num-experts 4 "
    "--moe-shared-expert-intermediate-size 192 --vocab-size 1000 --seq-length 128 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --train-iters 100 "
    "--kernel-impl reference --moe-expert-impl batched"
)
SIZES = _LINE.split()


def planned_config(flags: list[str]) -> RunConfig:
    """The small model with further flags."""
    return parse_args([*SIZES, *flags]).config


def planned_run(world_size: int, flags: list[str]) -> TrainingRun:
    """Groups, model and optimizer of this rank."""
    config = planned_config(flags)
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    plan = resolve_plan(config, layout.global_batch_size)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    return prepare_run(config, plan, ctx, chunks, VOCAB)


def batches_of(run: TrainingRun) -> list[Batch | None]:
    """Random micro-batches of this rank."""
    layout = run.ctx.layout
    generator = torch.Generator().manual_seed(run.ctx.dp_rank)
    shape = (layout.micro_batch_size, layout.seq_length + 1)
    found: list[Batch | None] = []
    for _ in range(layout.num_microbatches):
        ids = torch.randint(0, 1000, shape, generator=generator)
        mask = torch.ones(shape[0], shape[1] - 1)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)
        found.append(batch if run.ctx.needs_data else None)
    return found


PLANNED = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"}
"""Operations whose bytes the planner predicts; what is sent counts once, at the sender."""
SMALLEST = 1024
"""Bytes below which a collective is none of the planner's: counts, norms."""
Ranks = tuple[int, ...]


def measured_traffic(
    rank: int, world_size: int, *, flags: list[str]
) -> tuple[int, Layout, dict[str, Ranks], dict[tuple[str, Ranks], int]]:
    """Pipeline stage, layout, the ranks of each group of this rank, and bytes of the collectives
    of a step by kind and ranks.
    """
    run = planned_run(world_size, flags)
    pgs = run.ctx.pgs
    groups = {"edp": pgs.expt_dp, "dp": pgs.dp, "etp": pgs.expt_tp, "ep": pgs.ep}
    groups |= {"tp": pgs.tp, "pp": pgs.pp}
    ranks = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    batches = batches_of(run)
    with CollectiveLog() as log:
        train_step(run, batches, 1e-3, 1)
    counted: Counter[tuple[str, Ranks]] = Counter()
    for call in log.calls:
        if call.operation in PLANNED and call.size >= SMALLEST:
            # Of two stages, Megatron-Core has one direction in the group of all ranks, so that both
            # directions run at once (`p2p_communication._p2p_ops`).
            group = ranks["pp"] if call.operation == "send" else call.group
            counted[call.operation, group] += call.size
    return run.ctx.pp_rank, run.ctx.layout, ranks, dict(counted)


def measured_memory(
    rank: int, world_size: int, *, flags: list[str], detail: bool = False
) -> tuple[int, Layout, dict[str, int], Any]:
    """Pipeline stage, layout and peak of the second step of this rank, by category."""
    run = planned_run(world_size, flags)
    live = LiveMemory(classify=None, detail=detail)
    with live:
        batches = batches_of(run)
        train_step(run, batches, 1e-3, 1)
        mark_state(live, run)
        live.reset_peak()
        train_step(run, batches, 1e-3, 2)
    shown = (live.peak_operation, live.peak_tensors.most_common() if detail else [])
    return run.ctx.pp_rank, run.ctx.layout, live.peak.to_dict(), shown


def mark_state(live: LiveMemory, run: TrainingRun) -> None:
    """Tell the counter which tensors are parameters, gradients, optimizer state and buffers."""
    live.mark((p for chunk in run.chunks for p in chunk.parameters()), "parameters")
    buffers = [b for c in run.wrapped for b in [*c.buffers, *c.expert_parallel_buffers]]
    live.mark((b.grad_data for b in buffers), "gradients")
    for part in chained_optimizers(run.optimizer):
        live.mark(_state(part), "optimizer")
    held = parallel_state.get_global_memory_buffer().buffer.values()
    live.mark(held, "communication_buffers")


def _state(optimizer: Any) -> list[Tensor]:
    """Moments and fp32 master weights."""
    states = optimizer.optimizer.state.values()
    found = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
        groups = getattr(optimizer, name, [])
        found += [main for group in groups for main in group if main is not None]
    return found
