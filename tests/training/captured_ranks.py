"""Steps on a rank, each computed anew or repeated from a capture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_moe.data.batch import Batch
from megatron_moe.moe.statistics import check_ledger, collect_statistics, reset_statistics
from megatron_moe.training.captured import CapturedPasses
from megatron_moe.training.step import train_step
from tests.support.recorded import RecordedOps
from tests.training.ranks import fingerprint, rank_batches, tiny_run

STEPS = 5


def several_steps(
    rank: int, world_size: int, *, flags: list[str], captured: bool
) -> dict[str, Any]:
    """Five steps; after two, statistics begin anew.

    Args:
        rank: of this process.
        world_size: ranks.
        flags: with `--cuda-graph full`.
        captured: whether the third step is captured, and it and later ones repeat it.
    """
    run = tiny_run(world_size, flags)
    assert run.captured is not None
    if run.ctx.platform.device.type == "cpu":
        run = replace(run, captured=CapturedPasses(RecordedOps, warm_up=2))
    if not captured:
        run = replace(run, captured=None)
    sums, norms, device = [], [], run.ctx.platform.device
    for step in range(STEPS):
        batches = [batch and _shifted(batch, step, device) for batch in rank_batches(run)]
        if step == 2:
            reset_statistics(run.chunks)
        result = train_step(run, batches, 1e-2, step + 1)
        sums.append(result.sums)
        norms.append(result.grad_norm)
    layers = collect_statistics(run.chunks, run.ctx.pgs)
    config = run.config
    positions = (STEPS - 2) * run.ctx.layout.global_batch_size * config.data.seq_length
    moe = config.moe
    check_ledger(layers, positions, moe.moe_router_topk, moe.moe_ignore_padding_tokens)
    return {
        "sums": [tuple(each.tolist()) for each in sums],
        "norms": norms,
        "weights": fingerprint(run),
        "statistics": {number: layer.to_json() for number, layer in layers.items()},
        "ledger": True,
    }


def _shifted(batch: Batch, step: int, device: torch.device) -> Batch:
    """Other tokens and targets in each step, and padding."""
    padding = torch.zeros_like(batch.tokens_BS)
    padding[:, -1 - step :] = 1
    return Batch(
        tokens_BS=batch.tokens_BS.roll(step, 1).to(device),
        labels_BS=batch.labels_BS.roll(step, 1).to(device),
        loss_mask_BS=batch.loss_mask_BS.roll(step, 1).mul(1 - padding).to(device),
        padding_BS=padding.to(device),
    )
