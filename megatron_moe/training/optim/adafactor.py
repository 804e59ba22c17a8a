"""Adafactor as OpenMoE was trained with it, for logical tensors that are sharded over ranks.

Shazeer and Stern, arXiv 1804.04235, in the form of the released training code: no momentum, no
weight decay, relative step sizes. For a matrix G [R, C], its gradient, at step t = 1, 2, ...

    b = 1 - t^-0.8
    row [R] <- b row + (1 - b) (mean over columns of G^2 + 1e-30)          likewise column [C]
    U = G / sqrt(row column / mean(row))
    W <- W - lr max(1e-3, RMS(W)) U / max(1, RMS(U))

Vectors, and matrices with a size below 128, keep all second moments V: U = G / sqrt(V). R, C and
both RMS are those of the *logical* tensor: of q alone although q, k and v are one local parameter;
of one expert although a rank has several; of the whole matrix although each tensor-parallel rank
holds a part of it. So ranks all-reduce their sums of squares, those of all tensors in one message:
one message for the statistics and one for RMS(U). Sums are fp64, so that they do not depend on how
a matrix is split. Nothing is read back by the host.

Example: a [4, 6] matrix split by columns over two ranks, each with [4, 3]. A rank's column sums are
complete, since all rows are there; its row sums [4] cover half of the columns and are all-reduced;
RMS(U) is sqrt of the all-reduced sum of squares over 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.config import OptimizerConfig
from megatron_moe.model.sharding.blocks import Part
from megatron_moe.model.sharding.optimizer_state import replace_inner
from megatron_moe.model.sharding.shards import ParamShard
from megatron_moe.training.optim.factoring import Factoring

ROW, COLUMN, FULL = "variance_row", "variance_column", "variance"
"""Kinds of state: mean squares of each row, of each column, or of every element."""
SQUARE_FLOOR = 1e-30
"""Added to squared gradients."""
SCALE_FLOOR = 1e-3
"""Lower bound of RMS(W): a tensor that is initialized to zero could not move otherwise."""

Pending = dict[ProcessGroup, list[Tensor]]
"""Local sums that must be all-reduced over each group."""


@dataclass
class _LogicalTensor:
    """This rank's block of one logical tensor, and what a step computes of it."""

    main: Tensor
    factoring: Factoring
    group: ProcessGroup
    state: dict[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add_sum(self, name: str, block: Tensor, over: tuple[int, ...], pending: Pending) -> None:
        """Compute a local sum of squares, and queue it for the all-reduce if it is split."""
        self.sums[name] = self.factoring.squares(block, over)
        if self.factoring.is_split(over):
            pending.setdefault(self.group, []).append(self.sums[name])


class Adafactor(torch.optim.Optimizer):
    """Adafactor over this rank's parameters.

    Args:
        param_groups: what Megatron-Core's wrapper updates: parameters, or their fp32 masters.
        shards: the logical tensors that each of these consists of.
        settings: decay, clipping, and which matrices are factored.
        pgs: `tp` splits dense matrices, `expt_tp` splits experts.
    """

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        shards: Mapping[Tensor, ParamShard],
        settings: OptimizerConfig,
        pgs: ProcessGroupCollection,
    ) -> None:
        super().__init__(list(param_groups), {"lr": settings.lr, "step": 0})
        self._settings = settings
        self._tensors: dict[Tensor, list[_LogicalTensor]] = {}
        for main in (main for group in self.param_groups for main in group["params"]):
            shard = shards[main]
            split_over = pgs.expt_tp if shard.expert else pgs.tp
            factorings = [
                Factoring.of(piece, expert=shard.expert, min_dim=settings.adafactor_min_dim)
                for piece in shard.pieces
            ]
            self._tensors[main] = [
                _LogicalTensor(main, factoring, split_over, _empty_state(factoring, main.device))
                for factoring in factorings
            ]
            self.state[main] = {
                f"{kind} of {tensor.factoring.piece.name}": value
                for tensor in self._tensors[main]
                for kind, value in tensor.state.items()
            }

    def logical_state(self, main: Tensor) -> Iterator[Part]:
        """The state of one parameter as checkpoints hold it; shares memory with the optimizer."""
        for tensor in self._tensors[main]:
            for kind, value in tensor.state.items():
                yield tensor.factoring.part(kind, _kept(tensor.factoring, kind), value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the gradients become the updates."""
        assert closure is None, "gradients are ready when this is called"
        active: list[tuple[_LogicalTensor, dict[str, Any]]] = []
        for group in self.param_groups:
            group["step"] += 1
            mains = [main for main in group["params"] if main.grad is not None]
            active += [(tensor, group) for main in mains for tensor in self._tensors[main]]
        pending: Pending = {}
        for tensor, _ in active:
            _measure(tensor, pending)
        _reduce(pending)
        pending = {}
        for tensor, group in active:
            decay = 1.0 - group["step"] ** -self._settings.adafactor_decay_rate
            _precondition(tensor, decay, pending)
        _reduce(pending)
        for tensor, group in active:
            _apply(tensor, group["lr"], self._settings.adafactor_clip_threshold)


def install_adafactor(
    optimizer: Any,
    shards: Iterable[ParamShard],
    settings: OptimizerConfig,
    pgs: ProcessGroupCollection,
) -> None:
    """Replace the optimizer inside Megatron-Core's wrappers by Adafactor.

    Args:
        optimizer: Megatron-Core's, without sharding over data-parallel ranks.
        shards: the table of this rank's parameters.
        settings: of Adafactor.
        pgs: this rank's groups.
    """
    replace_inner(optimizer, shards, lambda groups, table: Adafactor(groups, table, settings, pgs))


def _kept(factoring: Factoring, kind: str) -> tuple[int, ...]:
    """The logical dimensions that a kind of state has."""
    if kind == FULL:
        return (*factoring.batch, *factoring.matrix)
    return (*factoring.batch, factoring.row if kind == ROW else factoring.column)


def _empty_state(factoring: Factoring, device: torch.device) -> dict[str, Tensor]:
    kinds = (ROW, COLUMN) if factoring.factored else (FULL,)
    return {k: factoring.empty_statistic(_kept(factoring, k), device) for k in kinds}


def _measure(tensor: _LogicalTensor, pending: Pending) -> None:
    """Sums of squares: of the gradient along rows and columns, and of the parameter."""
    factoring, select = tensor.factoring, tensor.factoring.piece.select
    assert tensor.main.grad is not None
    tensor.add_sum("parameter", select(tensor.main), factoring.matrix, pending)
    if factoring.factored:
        grad = select(tensor.main.grad)
        tensor.add_sum(ROW, grad, (factoring.column,), pending)
        tensor.add_sum(COLUMN, grad, (factoring.row,), pending)


def _precondition(tensor: _LogicalTensor, decay: float, pending: Pending) -> None:
    """Update the second moments; the gradient is overwritten with U, before clipping."""
    factoring, state = tensor.factoring, tensor.state
    assert tensor.main.grad is not None
    update = factoring.piece.select(tensor.main.grad)
    if factoring.factored:
        for kind, over in ((ROW, factoring.column), (COLUMN, factoring.row)):
            mean = tensor.sums[kind] / factoring.extent((over,)) + SQUARE_FLOOR
            state[kind].lerp_(mean.float(), 1.0 - decay)
        # mean(row) and mean(column) are both the mean over the whole matrix, and tensor parallelism
        # splits at most one dimension: take the mean of the statistic that is whole on this rank,
        # which saves an all-reduce.
        whole, along = (ROW, factoring.row)
        if factoring.is_split((factoring.row,)):
            whole, along = (COLUMN, factoring.column)
        mean = factoring.mean(state[whole], (along,))
        update.mul_((state[ROW] / mean).rsqrt_()).mul_(state[COLUMN].rsqrt())
    else:
        state[FULL].lerp_(update.square() + SQUARE_FLOOR, 1.0 - decay)
        update.mul_(state[FULL].rsqrt())
    tensor.add_sum("update", update, factoring.matrix, pending)


def _apply(tensor: _LogicalTensor, rate: float, threshold: float) -> None:
    """Apply the clipped update, scaled by the RMS of the parameter."""
    factoring = tensor.factoring
    assert tensor.main.grad is not None
    count = factoring.extent(factoring.matrix)
    scale = (tensor.sums["parameter"] / count).sqrt_().clamp_(min=SCALE_FLOOR)
    excess = (tensor.sums["update"] / count).sqrt_().div_(threshold).clamp_(min=1.0)
    select = factoring.piece.select
    select(tensor.main).addcmul_(select(tensor.main.grad), (scale / excess).float(), value=-rate)
    tensor.sums.clear()


def _reduce(pending: Pending) -> None:
    """All-reduce the queued sums, in one message for each group."""
    for group, sums in pending.items():
        flat = torch.cat([value.view(-1) for value in sums])
        torch.distributed.all_reduce(flat, group=group)
        for value, total in zip(sums, flat.split([v.numel() for v in sums]), strict=True):
            value.copy_(total.view_as(value))
