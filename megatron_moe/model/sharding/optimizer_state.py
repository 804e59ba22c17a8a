"""The state that Megatron-Core's optimizers hold for each parameter, in one form.

Megatron-Core has three optimizers, chained if dense and expert parameters differ: fp32, half
precision with fp32 masters, and the distributed optimizer, in which each data-parallel rank holds a
flat range of each parameter. Here the state of all three is flat tensors that start at some element
of the flattened local parameter: at 0, or at the start of the range.

    parameter [3, 4], distributed over two ranks     rank 0: elements 0..5, start 0
                                                     rank 1: elements 6..11, start 6

State of other shapes, such as Adafactor's row and column means, is returned by its optimizer as
blocks of logical tensors (`LogicalState`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.model.sharding.blocks import Part
from megatron_moe.model.sharding.shards import ParamShard

MASTER = "master"
"""Kind of the fp32 copy of a half-precision weight."""
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Kinds of state, by their names in torch: Adam's moments; SGD's momentum."""


@runtime_checkable
class LogicalState(Protocol):
    """An inner optimizer whose state is not shaped like the parameters.

    It counts steps in its parameter groups, as `step`, and creates all of its state when built.
    """

    def logical_state(self, main: Tensor) -> Iterable[Part]:
        """State of the tensor ``main`` that it updates; shares memory with the optimizer."""
        ...


@dataclass(frozen=True)
class OptimizerShard:
    """State of one parameter on this rank.

    Args:
        tensors: kind -> flat tensor that shares memory with the optimizer.
        start: element of the flattened local parameter at which the tensors start.
        sharded: whether data-parallel ranks hold disjoint ranges, rather than equal copies.
        parts: state that is not shaped like the parameter.
    """

    tensors: dict[str, Tensor]
    start: int
    sharded: bool
    parts: tuple[Part, ...] = ()


def optimizer_shards(optimizer: Any) -> dict[Tensor, OptimizerShard]:
    """State by model parameter; state that the first step would create is created here.

    Args:
        optimizer: from `megatron.core.optimizer.get_megatron_optimizer`.
    """
    shards = {}
    for leaf in leaves(optimizer):
        for param, main, start, sharded in parameters(leaf):
            tensors, parts = _state(leaf.optimizer, main)
            if main.dtype != param.dtype:
                tensors[MASTER] = main.detach().view(-1)
            shards[param] = OptimizerShard(tensors, start, sharded, parts)
    return shards


def _state(inner: Any, main: Tensor) -> tuple[dict[str, Tensor], tuple[Part, ...]]:
    """State shaped like the parameter, and state that is not."""
    if isinstance(inner, LogicalState):
        return {}, tuple(inner.logical_state(main))
    state = inner.state[main]
    if not state:
        _create_state(inner, main, state)
    return {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}, ()


def leaves(optimizer: Any) -> Iterator[Any]:
    """The optimizers of a chain that hold parameters; Megatron-Core's stubs are left out."""
    for leaf in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not leaf.is_stub_optimizer:
            yield leaf


def replace_inner(
    optimizer: Any,
    shards: Iterable[ParamShard],
    make: Callable[[list[dict[str, Any]], dict[Tensor, ParamShard]], Any],
) -> None:
    """Put an optimizer of our own inside Megatron-Core's wrappers.

    Args:
        optimizer: Megatron-Core's, without sharding over data-parallel ranks.
        shards: the table of this rank's parameters.
        make: from the groups of parameters, or of their fp32 masters, and the logical tensors that
            each of these consists of.
    """
    by_param = {shard.param: shard for shard in shards}
    kept = ("params", "wd_mult", "is_expert_parallel")
    for leaf in leaves(optimizer):
        table = {main: by_param[param] for param, main, _, _ in parameters(leaf)}
        groups = [{key: group[key] for key in kept} for group in leaf.optimizer.param_groups]
        leaf.optimizer = make(groups, table)


def parameters(leaf: Any) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
    """Pairs of model parameter and the tensor that the inner optimizer updates in its place.

    Yields:
        The parameter; the updated tensor (itself, its fp32 master, or this rank's range of one of
        them); the range's first element; whether the range is this rank's alone.

    Raises:
        CheckpointError: the optimizer is none of Megatron-Core's three.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    # The pairs come from the lists by which Megatron-Core copies gradients. Its index from
    # parameters to groups is wrong for groups of mixed precision: it ignores that fp32 shards
    # come first in them.
    if isinstance(leaf, DistributedOptimizer):
        half = zip(leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups, strict=True)
        full = zip(leaf.model_fp32_groups, leaf.shard_fp32_groups, strict=True)
        for params, mains in chain(half, full):
            for param, main in zip(params, mains, strict=True):
                yield param, main, leaf._get_model_param_range_map(param)["param"].start, True
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        half = zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True)
        full = zip(leaf.fp32_from_fp32_groups, leaf.fp32_from_fp32_groups, strict=True)
        for params, mains in chain(half, full):
            yield from ((p, m, 0, False) for p, m in zip(params, mains, strict=True))
    elif isinstance(leaf, FP32Optimizer):
        yield from ((param, param, 0, False) for param in leaf.get_parameters())
    else:
        kinds = "DistributedOptimizer, Float16OptimizerWithFloat16Params or FP32Optimizer"
        raise CheckpointError("class of the optimizer", type(leaf).__name__, kinds)


def _create_state(inner: torch.optim.Optimizer, main: Tensor, state: dict[str, Tensor]) -> None:
    """Zeros, as the first step would create: a load needs memory to fill, a save a full index."""
    group = next(g for g in inner.param_groups if any(p is main for p in g["params"]))
    if isinstance(inner, torch.optim.SGD):
        if group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(main.detach())
        return
    state["exp_avg"] = torch.zeros_like(main.detach())
    state["exp_avg_sq"] = torch.zeros_like(main.detach())
    if isinstance(inner, torch.optim.Adam):  # AdamW is one; fused ones count in the group
        on_device = group.get("capturable") or group.get("fused")
        double = torch.get_default_dtype() == torch.float64
        state["step"] = torch.zeros(
            (),
            dtype=torch.float64 if double else torch.float32,
            device=main.device if on_device else "cpu",
        )


def optimizer_step(optimizer: Any) -> int | None:
    """Number of steps that Adam's bias correction counts; None for SGD and for no parameters.

    Raises:
        CheckpointError: parameters have different counts.
    """
    steps = set()
    for leaf in leaves(optimizer):
        steps |= {int(s["step"]) for s in leaf.optimizer.state.values() if "step" in s}
        steps |= {int(g["step"]) for g in leaf.optimizer.param_groups if "step" in g}
    if len(steps) > 1:
        raise CheckpointError("optimizer step", sorted(steps), "the same for all parameters")
    return steps.pop() if steps else None


def set_optimizer_step(optimizer: Any, step: int | None) -> None:
    """The inverse of `optimizer_step`; `optimizer_shards` must have created the state.

    Args:
        optimizer: from `megatron.core.optimizer.get_megatron_optimizer`.
        step: the count to set.
    """
    # torch's Adam counts for each parameter; fused optimizers and Adafactor count in the group.
    for leaf in leaves(optimizer):
        counted = [s for s in leaf.optimizer.state.values() if "step" in s]
        for state in counted:
            state["step"].fill_(step)
        if not counted and not isinstance(leaf.optimizer, torch.optim.SGD):
            for group in leaf.optimizer.param_groups:
                group["step"] = step
