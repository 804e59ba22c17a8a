"""All layouts of a run on a cluster that the configuration allows and the memory holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.layout_plan import LayoutPlan, evaluate
from megatron_moe.planning.memory import state_memory
from megatron_moe.planning.step_memory import step_memory

RECOMPUTATIONS: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp", "moe")},
    {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)
"""Nothing; feed-forward layers and experts, whose inputs are small and activations large; all."""
DEGREES = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_last_pipeline_num_layers",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
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
    """Memory of the smallest layout; `None` if no layout is valid."""


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
        UsageError: no combination is valid, with the reason of the last one.
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
    plans.sort(key=lambda plan: plan.time.total)
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
        [d for d in _powers(cluster.gpus_per_node) if gpus % d == 0],
    )
    pps = values(
        "pipeline_model_parallel_size",
        parallel.pipeline_model_parallel_size,
        [d for d in _divisors(model.num_layers) if gpus % d == 0],
    )
    eps = values(
        "expert_model_parallel_size",
        parallel.expert_model_parallel_size,
        _divisors(moe.num_experts) if has_moe else [1],
    )
    micros = values("micro_batch_size", config.train.micro_batch_size, [1, 2])
    factors: list[float | None] = [*capacity_factors] or [moe.moe_expert_capacity_factor]
    again = values("recompute_granularity", None, list(RECOMPUTATIONS))
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
                list(_splits(model.num_layers, pp)),
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
                    changes = {**degrees, **(recompute or {})}
                    yield (
                        key,
                        replace(
                            config,
                            parallel=_with(parallel, changes, fixed),
                            train=replace(config.train, micro_batch_size=micro),
                            moe=replace(moe, moe_expert_capacity_factor=factor),
                        ),
                    )


def _splits(layers: int, pp: int) -> Iterator[tuple[int | None, int | None]]:
    """Chunks of each stage and layers of the last one: even, interleaved, and with fewer layers on
    the last stage, which has the logits, where the others can share the rest.
    """
    yield None, None
    if pp == 1:
        return
    for chunks in _divisors(layers // pp)[1:]:
        yield chunks, None
    fewer = [n for n in range(1, layers // pp) if (layers - n) % (pp - 1) == 0]
    for last in fewer[-2:]:
        yield None, last


def _with(parallel: Any, degrees: dict[str, Any], fixed: Collection[str]) -> Any:
    changed = {name: value for name, value in degrees.items() if name not in fixed}
    if changed.get("use_distributed_optimizer") and "overlap_grad_reduce" not in fixed:
        changed |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    return dataclasses.replace(parallel, **changed)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _divisors(total: int) -> list[int]:
    return [d for d in range(1, total + 1) if total % d == 0]


def launch_command(plan: LayoutPlan, words: list[str], layout_flags: list[str]) -> str:
    """The command that starts a run with a layout under `torchrun`.

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
    return " ".join([start, "pretrain_openmoe.py", *words, *layout_flags])


def flags_of(plan: LayoutPlan, fixed: Collection[str] = ()) -> list[str]:
    """The flags of a layout's degrees, except those that the command line has already."""
    config, flags = plan.config, []
    parallel, layout = config.parallel, plan.layout

    def add(name: str, value: Any) -> None:
        if name in fixed:
            return
        flag = "--" + name.replace("_", "-")
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
    if "global_batch_size" not in fixed:
        add("global_batch_size", layout.global_batch_size)
    add("use_distributed_optimizer", parallel.use_distributed_optimizer)
    add("overlap_grad_reduce", parallel.overlap_grad_reduce)
    add("overlap_param_gather", parallel.overlap_param_gather)
    add("recompute_granularity", parallel.recompute_granularity)
    if parallel.recompute_granularity == "selective" and "recompute_granularity" not in fixed:
        add("recompute_modules", parallel.recompute_modules)
    if parallel.recompute_granularity == "full":
        add("recompute_method", parallel.recompute_method)
        add("recompute_num_layers", parallel.recompute_num_layers)
    add("moe_expert_capacity_factor", config.moe.moe_expert_capacity_factor)
    return flags
