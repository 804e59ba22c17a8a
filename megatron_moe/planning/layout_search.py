"""All layouts of a run on a cluster that the configuration allows and the memory holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.run import flag_of
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.layout_plan import LayoutPlan, evaluate
from megatron_moe.planning.memory import state_memory
from megatron_moe.planning.step_memory import step_memory

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Degrees whose products divide the GPUs."""
DEGREES = {
    *SIZES,
    "num_virtual_stages_per_pipeline_rank",
    "decoder_last_pipeline_num_layers",
    "micro_batch_size",
    "recompute_granularity",
    "moe_expert_capacity_factor",
    "use_distributed_optimizer",
}
"""What is searched unless the command line gives it."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Layouts, fastest first, and why others are not among them."""

    plans: tuple[LayoutPlan, ...]
    tried: int
    """Combinations of degrees."""
    invalid: int
    """Of these, those that the configuration does not allow."""
    too_large: int
    """And those that need more memory than a GPU has."""
    least_bytes: int | None
    """Memory of the smallest layout; `None` if not even the state of any layout fits."""


def search(
    config: RunConfig,
    vocab_size: int,
    cluster: Cluster,
    gpus: int,
    *,
    fixed: Collection[str] = (),
    capacity_factors: tuple[float, ...] = (),
) -> SearchResult:
    """Try every combination.

    Args:
        config: the run; its degrees are replaced, except the fixed ones.
        vocab_size: V, padded.
        cluster: where it runs.
        gpus: all of them.
        fixed: names of fields that keep the configuration's value.
        capacity_factors: to try; empty: the configuration's.

    Raises:
        UsageError: no combination is valid, with the reason of the last one; or the fixed sizes do
            not divide the GPUs.
    """
    plans: list[LayoutPlan] = []
    tried = invalid = too_large = 0
    least, reason = None, None
    fits: tuple[Any, ...] | None = None
    for key, candidate in _candidates(config, cluster, gpus, fixed, capacity_factors):
        if key == fits:
            continue  # Fits with less recomputation, which is faster.
        tried += 1
        try:
            validate(candidate)
            layout = resolve_layout(candidate, gpus, vocab_size)
        except UsageError as error:
            invalid, reason = invalid + 1, error
            continue
        states = state_memory(candidate, layout, vocab_size)
        if max(state.total for state in states) > cluster.usable_bytes:
            too_large += 1
            continue
        stages = step_memory(candidate, layout, vocab_size)
        needed = max(stage.peak.total for stage in stages)
        least = needed if least is None else min(least, needed)
        if needed > cluster.usable_bytes:
            too_large += 1
            continue
        fits = key
        plans.append(evaluate(candidate, layout, vocab_size, cluster, stages))
    if reason is not None and invalid == tried:
        raise reason
    if not tried:
        sizes = [f"{flag_of(n)} {getattr(config.parallel, n)}" for n in SIZES if n in fixed]
        raise UsageError("--gpus", gpus, f"a multiple of {' x '.join(sizes)}")
    # Not by the time of a step: without --global-batch-size, layouts differ in their batch.
    plans.sort(key=lambda plan: -plan.tokens_per_second)
    return SearchResult(
        plans=tuple(plans),
        tried=tried,
        invalid=invalid,
        too_large=too_large,
        least_bytes=least,
    )


def _candidates(
    config: RunConfig,
    cluster: Cluster,
    gpus: int,
    fixed: Collection[str],
    capacity_factors: tuple[float, ...],
) -> Iterator[tuple[tuple[Any, ...], RunConfig]]:
    """Combinations with what they are besides recomputation, from the least of it to the most."""
    parallel, model, moe = config.parallel, config.model, config.moe
    has_moe = bool(config.moe_layers)

    def values(name: str, given: Any, found: list[Any]) -> list[Any]:
        return [given] if name in fixed else found

    tps = values(
        "tensor_model_parallel_size",
        parallel.tensor_model_parallel_size,
        [d for d in _divisors(cluster.gpus_per_node) if gpus % d == 0],
    )
    pps = values(
        "pipeline_model_parallel_size",
        parallel.pipeline_model_parallel_size,
        [d for d in _divisors(gpus) if d <= model.num_layers and _splits(model.num_layers, d)],
    )
    eps = values(
        "expert_model_parallel_size",
        parallel.expert_model_parallel_size,
        _divisors(math.gcd(*moe.numbers_of_experts)) if has_moe else [1],
    )
    micros = values("micro_batch_size", config.train.micro_batch_size, [1, 2])
    factors: list[float | None] = [*capacity_factors] or [moe.moe_expert_capacity_factor]
    again = values("recompute_granularity", {}, _recomputations(has_moe))
    sharded = values(
        "use_distributed_optimizer",
        parallel.use_distributed_optimizer,
        [config.optimizer.optimizer == "adam"],
    )
    grid = itertools.product(tps, pps, eps, micros, factors, sharded)
    for tp, pp, ep, micro, factor, shards in grid:
        for etp in values(
            "expert_tensor_parallel_size",
            parallel.expert_tensor_parallel_size,
            sorted({1, tp}) if has_moe else [None],
        ):
            if gpus % (pp * tp) or gpus % (pp * ep * (etp or tp)):
                continue
            for chunks, last in values(
                "num_virtual_stages_per_pipeline_rank",
                (
                    parallel.num_virtual_stages_per_pipeline_rank,
                    parallel.decoder_last_pipeline_num_layers,
                ),
                # Of a given degree without a division, `resolve_layout` says what is wrong.
                _splits(model.num_layers, pp) or [(None, None)],
            ):
                degrees = {
                    "tensor_model_parallel_size": tp,
                    "sequence_parallel": tp > 1,
                    "pipeline_model_parallel_size": pp,
                    "num_virtual_stages_per_pipeline_rank": chunks,
                    "decoder_last_pipeline_num_layers": last,
                    "expert_model_parallel_size": ep,
                    "expert_tensor_parallel_size": etp,
                    "use_distributed_optimizer": shards,
                }
                key = (*degrees.values(), micro, factor)
                for recompute in again:
                    changes = {**degrees, **recompute}
                    yield (
                        key,
                        replace(
                            config,
                            parallel=_with(parallel, changes, fixed),
                            train=replace(config.train, micro_batch_size=micro),
                            moe=replace(moe, moe_expert_capacity_factor=factor),
                        ),
                    )


def _recomputations(has_moe: bool) -> list[dict[str, Any]]:
    """Nothing; feed-forward layers and experts, whose inputs are small and activations large; all.

    From the least memory saved to the most.
    """
    modules = ("mlp", "moe") if has_moe else ("mlp",)
    every = {"recompute_method": "uniform", "recompute_num_layers": 1}
    return [
        {"recompute_granularity": None},
        {"recompute_granularity": "selective", "recompute_modules": modules},
        {"recompute_granularity": "full", **every},
    ]


def _splits(layers: int, pp: int) -> list[tuple[int | None, int | None]]:
    """Chunks of each stage and layers of the last one: even, interleaved, and with fewer layers on
    the last stage, which has the logits, where the others can share the rest. Empty if there is no
    such division.
    """
    if pp == 1:
        return [(None, None)]
    found: list[tuple[int | None, int | None]] = []
    if layers % pp == 0:
        found += [(None, None), *((chunks, None) for chunks in _divisors(layers // pp)[1:])]
    fewer = [n for n in range(1, -(-layers // pp)) if (layers - n) % (pp - 1) == 0]
    return [*found, *((None, last) for last in fewer[-2:])]


def _with(parallel: Any, degrees: dict[str, Any], fixed: Collection[str]) -> Any:
    """The degrees that are not fixed; with a sharded optimizer also overlapped transfers, as far as
    the command line does not say otherwise.
    """
    made = dataclasses.replace(parallel, **{k: v for k, v in degrees.items() if k not in fixed})
    if made.use_distributed_optimizer and "overlap_grad_reduce" not in fixed:
        made = dataclasses.replace(made, overlap_grad_reduce=True)
    both = made.use_distributed_optimizer and made.overlap_grad_reduce
    if both and "overlap_param_gather" not in fixed:
        made = dataclasses.replace(made, overlap_param_gather=True)
    return made


def _divisors(total: int) -> list[int]:
    return [d for d in range(1, total + 1) if total % d == 0]


def launch_command(plan: LayoutPlan, words: list[str], layout_flags: list[str]) -> str:
    """The command that starts a run with a layout under `torchrun`, quoted for a shell.

    Args:
        plan: the layout.
        words: the command line of the run without its degrees.
        layout_flags: from `flags_of`.
    """
    layout, cluster = plan.layout, plan.cluster
    here = min(layout.world_size, cluster.gpus_per_node)
    nodes = -(-layout.world_size // here)
    start = f"torchrun --nproc-per-node {here}"
    if nodes > 1:
        start += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD_NODE:29500"
    return f"{start} {shlex.join(['pretrain_openmoe.py', *words, *layout_flags])}"


def flags_of(plan: LayoutPlan, fixed: Collection[str] = ()) -> list[str]:
    """The flags of a layout's degrees, except those that the command line has already."""
    config, flags = plan.config, []
    parallel, layout = config.parallel, plan.layout

    def add(name: str, value: Any) -> None:
        if name in fixed:
            return
        flag = flag_of(name)
        if value is True:
            flags.append(flag)
        elif isinstance(value, tuple):
            flags.extend([flag, *map(str, value)])
        elif value is not None and value is not False:
            flags.extend([flag, str(value)])

    add("tensor_model_parallel_size", layout.tp)
    add("sequence_parallel", parallel.sequence_parallel)
    add("pipeline_model_parallel_size", layout.pp)
    add("num_virtual_stages_per_pipeline_rank", parallel.num_virtual_stages_per_pipeline_rank)
    add("decoder_last_pipeline_num_layers", parallel.decoder_last_pipeline_num_layers)
    add("expert_model_parallel_size", layout.ep)
    add("expert_tensor_parallel_size", parallel.expert_tensor_parallel_size)
    add("micro_batch_size", layout.micro_batch_size)
    add("global_batch_size", layout.global_batch_size)
    add("use_distributed_optimizer", parallel.use_distributed_optimizer)
    add("overlap_grad_reduce", parallel.overlap_grad_reduce)
    add("overlap_param_gather", parallel.overlap_param_gather)
    if "recompute_granularity" not in fixed:
        add("recompute_granularity", parallel.recompute_granularity)
        if parallel.recompute_granularity == "selective":
            add("recompute_modules", parallel.recompute_modules)
        add("recompute_method", parallel.recompute_method)
        add("recompute_num_layers", parallel.recompute_num_layers)
    add("moe_expert_capacity_factor", config.moe.moe_expert_capacity_factor)
    return flags
