"""Tokens between ranks: sequence shards to whole groups, buffer rows to the ranks of their experts.

Each exchange has equal, fixed sizes, so none waits for the host. Each is a differentiable function
whose gradient is the opposite exchange.

- Tensor parallelism (with sequence parallelism) shards the sequence. The choices, small integers,
  are gathered so that a capacity group is ranked as a whole. The slots of every expert are divided
  evenly among the ranks of the group, so no rank computes what another does; each fills its slots
  from the gathered tokens, and the outputs are summed back into sequence shards.
- Expert parallelism sends block i of the buffer to rank i and back.
- Expert tensor parallelism gathers the rows of the ranks that share an expert and sums back their
  partial outputs. Where these ranks are the tensor-parallel ranks and there is no expert
  parallelism, they hold the same tokens already: slots are not divided, and nothing is gathered.

Shapes: R buffer rows, H hidden, E experts, e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None


def size_of(group: Group) -> int:
    """Ranks of a group; no group is one rank."""
    return 1 if group is None else group.size()


def rank_of(group: Group) -> int:
    """This process' rank in a group."""
    return 0 if group is None else group.rank()


def _unrecorded(step: str) -> None:
    """No one records steps."""


@dataclass
class ExchangeClock:
    """Measures each all-to-all, forward and backward; nothing until a timer is set.

    Of an all-to-all that overlaps with computation, it measures how long it is waited for.

    Attributes:
        measure: a context around each.
        record: called with the name of each step of overlapping exchanges, in order.
    """

    measure: Callable[[], AbstractContextManager[None]] = nullcontext
    record: Callable[[str], None] = _unrecorded


@dataclass(frozen=True)
class ExpertGroups:
    """The process groups of an expert layer, and what follows from them.

    Args:
        tp: ranks that hold shards of the same sequences.
        ep: ranks over which experts are spread.
        expt_tp: ranks that share each expert.
        slot_shares: ranks among which the slots of an expert are divided.
        gather_rows: whether ranks that share an expert must gather each other's rows.
        clock: measures the exchanges with ``ep``.
    """

    tp: Group
    ep: Group
    expt_tp: Group
    slot_shares: int
    gather_rows: bool
    clock: ExchangeClock = field(default_factory=ExchangeClock)

    @classmethod
    def of(cls, pgs: Any) -> ExpertGroups:
        """From a `ProcessGroupCollection`; a group it lacks is one rank, as is ``pgs`` = `None`."""
        tp, ep, expt_tp = (getattr(pgs, name, None) for name in ("tp", "ep", "expt_tp"))
        same_tokens = size_of(ep) == 1 and _ranks(tp) == _ranks(expt_tp)
        shares = 1 if same_tokens else size_of(tp)
        return cls(tp, ep, expt_tp, shares, size_of(expt_tp) > 1 and not same_tokens)

    @property
    def sources(self) -> int:
        """Ranks whose rows arrive at an expert."""
        return size_of(self.ep) * (size_of(self.expt_tp) if self.gather_rows else 1)

    def to_experts(self, rows_RH: Tensor) -> Tensor:
        """Blocks of rows by expert rank -> the blocks of all sources for this rank's experts."""
        rows_RH = all_to_all(rows_RH, self.ep, self.clock)
        return all_gather(rows_RH, self.expt_tp) if self.gather_rows else rows_RH

    def from_experts(self, rows_RH: Tensor) -> Tensor:
        """The way back: partial outputs of this rank's experts -> outputs of this rank's rows."""
        if self.gather_rows:
            rows_RH = reduce_scatter(rows_RH, self.expt_tp)
        return all_to_all(rows_RH, self.ep, self.clock)

    def counts_by_source(self, filled_E: Tensor) -> Tensor:
        """Rows filled for each of this rank's experts in the block of each source, [sources, e]."""
        return self.to_experts(filled_E).view(self.sources, -1)


def _ranks(group: Group) -> list[int]:
    """Global ranks of a group; one rank is any rank."""
    return [] if group is None or group.size() == 1 else dist.get_process_group_ranks(group)


def all_to_all(x: Tensor, group: Group, clock: ExchangeClock | None = None) -> Tensor:
    """Equal split of dimension 0."""
    return x if size_of(group) == 1 else _AllToAll.apply(x, group, clock or ExchangeClock())


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate along dimension 0; the gradient is summed over the group and split."""
    return x if size_of(group) == 1 else _AllGather.apply(x, group)


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sum over the group and keep this rank's part of dimension 0; the gradient is gathered."""
    return x if size_of(group) == 1 else _ReduceScatter.apply(x, group)


def _exchange(x: Tensor, group: Group) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[0] * size_of(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[0] // size_of(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, clock: ExchangeClock) -> Tensor:
        ctx.group, ctx.clock = group, clock
        with clock.measure():
            return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with ctx.clock.measure():
            return _exchange(grads[0], ctx.group), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.group), None
