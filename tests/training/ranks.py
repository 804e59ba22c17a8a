"""Functions that run on the ranks of the pool: one step, one evaluation, on made-up batches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.data.batch import Batch
from megatron_moe.model.build import build_model
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from megatron_moe.training.evaluation import evaluate
from megatron_moe.training.plan import resolve_plan
from megatron_moe.training.run import TrainingRun, prepare_run
from megatron_moe.training.step import NonFiniteError, clip_gradients, train_step
from megatron_moe.training.whole_model import grad_norm, params_square
from tests.training.tiny import MODEL

PADDED_VOCAB = 128
LARGE_VOCAB = 8192
LARGE = ["--hidden-size", "256", "--vocab-size", str(LARGE_VOCAB)]
"""A model whose matrices have up to two million elements."""


def tiny_config(flags: list[str]) -> RunConfig:
    """The tiny model with further flags."""
    return parse_args([*MODEL, "--train-iters", "10", *flags]).config


def tiny_run(world_size: int, flags: list[str], vocab: int = PADDED_VOCAB) -> TrainingRun:
    """Groups, model and optimizer of this rank."""
    config = tiny_config(flags)
    platform = activate()
    layout = resolve_layout(config, world_size, vocab)
    plan = resolve_plan(config, layout.global_batch_size)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, vocab, platform.device)
    return prepare_run(config, plan, ctx, chunks, vocab)


def global_batch(config: RunConfig) -> Batch:
    """Eight rows with very different numbers of targets, 0, 1, 4, 9, ... of 32.

    They are at the ends of the rows, where tokens are dropped, so that capacity shows in the loss.
    """
    generator = torch.Generator().manual_seed(5)
    rows, length = 8, config.data.seq_length
    ids = torch.randint(0, 100, (rows, length + 1), generator=generator)
    targets = torch.tensor([min(row * row, length) for row in range(rows)])
    mask = (torch.arange(length) >= length - targets[:, None]).float()
    return Batch(tokens_BS=ids[:, :-1], labels_BS=ids[:, 1:], loss_mask_BS=mask)


def rank_batches(run: TrainingRun) -> list[Batch | None]:
    """This rank's micro-batches of `global_batch`."""
    layout, whole = run.ctx.layout, global_batch(run.config)
    size, found = layout.micro_batch_size, list[Batch | None]()
    for index in range(layout.num_microbatches):
        first = (index * layout.dp + run.ctx.dp_rank) * size
        part = slice(first, first + size)
        batch = Batch(whole.tokens_BS[part], whole.labels_BS[part], whole.loss_mask_BS[part])
        found.append(batch if run.ctx.needs_data else None)
    return found


def step_and_evaluation(rank: int, world_size: int, *, flags: list[str]) -> dict[str, float]:
    """Evaluate, step; loss, squared log Z, targets and gradient norm of the step."""
    run = tiny_run(world_size, [*flags, "--log-num-zeros-in-grad", "--log-params-norm"])
    held_out = evaluate(run, lambda: rank_batches(run), 2)
    result = train_step(run, rank_batches(run), 0.0, 1)
    sums = result.sums.clone()
    dist.all_reduce(sums)
    cross_entropy, log_z, targets = sums.tolist()
    return {
        "lm_loss": cross_entropy / targets,
        "logit_z": log_z / targets,
        "targets": targets,
        "grad_norm": result.grad_norm,
        "num_zeros": result.zeros.item(),
        "params_norm": math.sqrt(result.params_square.item()),
        "held_out": held_out.lm_loss,
        "held_out_targets": held_out.targets,
    }


def norms_of_known_gradients(rank: int, world_size: int, *, flags: list[str]) -> dict[str, float]:
    """Norms of a large model whose gradient is its parameters, and after clipping to 1."""
    run = tiny_run(world_size, [*LARGE, *flags], LARGE_VOCAB)
    device = run.ctx.platform.device
    for part in run.optimizer.chained_optimizers:
        for param in part.get_parameters():
            param.grad = param.detach().clone()
    norm = grad_norm(run.optimizer, device)
    square = params_square(run.optimizer, device)
    clip_gradients(run.optimizer, norm, 1.0)
    return {
        "grad_norm": norm,
        "params_norm": math.sqrt(square.item()),
        "clipped": grad_norm(run.optimizer, device),
    }


def poisoned_step(
    rank: int, world_size: int, *, flags: list[str], poisoned: int, healthy_steps: int
) -> dict[str, Any]:
    """Some good steps, then one for which a rank's first weight is not a number."""
    run = tiny_run(world_size, flags)
    for iteration in range(healthy_steps):
        train_step(run, rank_batches(run), 1e-3, iteration + 1)
    if rank == poisoned:
        # A norm's scale: no token can avoid it.
        norm = next(p for n, p in run.chunks[0].named_parameters() if "input_layernorm" in n)
        norm.data[0] = torch.nan
    before = fingerprint(run)
    try:
        train_step(run, rank_batches(run), 1e-3, healthy_steps + 1)
    except NonFiniteError as error:
        return {"message": str(error), "unchanged": fingerprint(run) == before}
    return {"message": None, "unchanged": None}


def fingerprint(run: TrainingRun) -> list[bytes]:
    """Bytes of all weights and moments of this rank."""
    tensors = [param.data for chunk in run.chunks for param in chunk.parameters()]
    for part in run.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            tensors += [state[name] for name in sorted(state)]
    flat = (tensor.detach().cpu().reshape(-1) for tensor in tensors)
    return [each.view(torch.uint8).numpy().tobytes() for each in flat]
