"""A training step on the emulated device, which notices what the host reads of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron_moe.model.build import build_model
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from megatron_moe.training.plan import resolve_plan
from megatron_moe.training.run import TrainingRun, prepare_run
from megatron_moe.training.step import train_step
from tests.support.emulated_gpu import GPU, HostReads, emulated_gpu
from tests.training.ranks import PADDED_VOCAB, rank_batches, tiny_config, tiny_run


@contextmanager
def on_device() -> Iterator[None]:
    """Inside, Megatron-Core allocates its buffers on the emulated device."""
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: GPU  # type: ignore[assignment, return-value]
    try:
        with emulated_gpu(gradients=True):
            yield
    finally:
        torch.cuda.current_device = before


def emulated_run(world_size: int, flags: list[str]) -> TrainingRun:
    """`tiny_run` on the emulated device; its steps run inside of `on_device`."""
    config = tiny_config(flags)
    platform = activate()
    layout = resolve_layout(config, world_size, PADDED_VOCAB)
    plan = resolve_plan(config, layout.global_batch_size)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, PADDED_VOCAB, platform.device)
    # A parameter that moves is replaced: keep the marks by which Megatron-Core reduces it.
    marks = [{name: vars(p) for name, p in chunk.named_parameters()} for chunk in chunks]
    with on_device():
        for chunk, kept in zip(chunks, marks, strict=True):
            for name, param in chunk.to("cuda").named_parameters():
                vars(param).update(kept[name])
        ctx = replace(ctx, platform=replace(platform, device=GPU))
        return prepare_run(config, plan, ctx, chunks, PADDED_VOCAB)


def step_with_reads(
    rank: int, world_size: int, *, flags: list[str], allowed: tuple[str, ...]
) -> tuple[list[float], float, list[tuple[str, str]]]:
    """Two steps; loss sums and gradient norm of the second, and what the host read in it.

    Args:
        rank: of this process.
        world_size: ranks.
        flags: beyond those of the tiny model.
        allowed: functions that may read.
    """
    run = emulated_run(world_size, flags)
    with on_device():
        batches = [batch and _moved(batch) for batch in rank_batches(run)]
        train_step(run, batches, 1e-3, 1)
        with HostReads(allowed) as reads:
            result = train_step(run, batches, 1e-3, 2)
        return result.sums.tolist(), result.grad_norm, reads.found


def _moved(batch: Any) -> Any:
    there = {name: value.to("cuda") for name, value in vars(batch).items() if value is not None}
    return replace(batch, **there)


def step_without_emulation(
    rank: int, world_size: int, *, flags: list[str]
) -> tuple[list[float], float]:
    """The same two steps on the CPU."""
    run = tiny_run(world_size, flags)
    batches = rank_batches(run)
    train_step(run, batches, 1e-3, 1)
    result = train_step(run, batches, 1e-3, 2)
    return result.sums.tolist(), result.grad_norm
