"""`--check-weight-hash-across-dp-replicas-interval`: replicas must hold the same weights.

Data-parallel ranks start with equal weights and apply equal updates, so they stay equal to the bit.
A faulty device, or a gradient that was not reduced, makes one of them drift, and nothing in the
loss shows which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.checkpoint.contents import finish_parameter_gather
from megatron_moe.model.sharding.shards import ParamShard, model_shards
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.training.run import TrainingRun

_CHUNK = 1 << 22
"""Elements that are hashed at once, so that 64-bit copies stay small."""
MOST_NAMED = 8
"""Parameters that an error names."""


class ReplicaError(RuntimeError):
    """Replicas of a parameter differ."""


def check_replicas(run: TrainingRun, iteration: int) -> None:
    """Compare the weights of all data-parallel replicas; called by all ranks together.

    Costs: one pass over the weights on their device, and per group of replicas one all-reduce of
    four numbers per parameter, whatever the number of ranks; then one host synchronization.
    Dense weights are compared over data-parallel ranks, experts over those with the same experts.

    Args:
        run: the model.
        iteration: of the last step, for the error.

    Raises:
        ReplicaError: on every rank: names each parameter and the ranks whose weights differ from
            those of most of its replicas.
    """
    finish_parameter_gather(run.wrapped)
    shards = list(model_shards(run.chunks, run.config.model, run.config.moe))
    device = run.ctx.platform.device
    found: list[list[Any]] = []
    equal = torch.ones((), dtype=torch.int64, device=device)
    for expert, group in ((False, run.ctx.pgs.dp_cp), (True, run.ctx.pgs.expt_dp)):
        mine = [shard for shard in shards if shard.expert is expert]
        if not mine or dist.get_world_size(group) == 1:
            continue
        hashes_P2 = torch.stack([weight_hash(shard.param) for shard in mine])
        # The least hash of all replicas and, negated, the largest: one message for both.
        least_P4 = torch.cat((hashes_P2, ~hashes_P2), dim=1)
        dist.all_reduce(least_P4, op=dist.ReduceOp.MIN, group=group)
        same_P = (least_P4[:, :2] == ~least_P4[:, 2:]).all(dim=1)
        equal = equal * same_P.all()
        found.append([mine, hashes_P2, same_P, min(dist.get_process_group_ranks(group))])
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    if not equal.item():
        _raise(run, iteration, found)


def weight_hash(weight: Tensor) -> Tensor:
    """Two numbers, int64 [2], that differ if any one element does, and if two are exchanged."""
    flat = weight.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + chunk.numel(), device=flat.device)
        total += torch.stack((chunk.sum(), (chunk * places).sum()))  # wraps around
    return total


def _raise(run: TrainingRun, iteration: int, found: Sequence[list[Any]]) -> None:
    mine: list[tuple[str, int, list[int]]] = []
    for shards, hashes_P2, same_P, first in found:
        differing = zip(shards, hashes_P2.tolist(), same_P.tolist(), strict=True)
        mine += [(_name(shard), first, value) for shard, value, same in differing if not same]
    ranks = RankGroup(run.ctx.rank, run.ctx.world_size, run.ctx.platform.device)
    gathered = ranks.gather(mine)
    parameters = ranks.broadcast(_differing(gathered) if gathered is not None else None)
    more = f" and {len(parameters) - MOST_NAMED} more" if len(parameters) > MOST_NAMED else ""
    raise ReplicaError(
        f"weights of data-parallel replicas must be equal (got, at iteration {iteration},"
        f" {'; '.join(parameters[:MOST_NAMED])}{more}); nothing was saved: the checkpoints since"
        " the last check may hold the wrong weights"
    )


def _differing(gathered: Sequence[Sequence[Any]]) -> list[str]:
    """For each parameter, the ranks whose hash is not the most frequent one of its replicas."""
    by_name: dict[tuple[str, int], dict[tuple[int, ...], list[int]]] = defaultdict(dict)
    for rank, entries in enumerate(gathered):
        for name, first, value in entries:
            by_name[name, first].setdefault(tuple(value), []).append(rank)
    lines = []
    for (name, _), groups in by_name.items():
        *others, most = sorted(groups.values(), key=len)
        ranks = sorted(rank for group in others for rank in group)
        lines.append(f"{name}: {_ranks(ranks)} not as {_ranks(most)}")
    return lines


def _name(shard: ParamShard) -> str:
    return " + ".join(piece.name for piece in shard.pieces)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
