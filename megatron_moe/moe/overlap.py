"""Exchanges of one chunk of slots while the experts compute another (`--moe-a2a-overlap-chunks`).

Between ranks a layer has four all-to-alls: rows to their experts and back, and the same for
gradients. In one piece, each stands between two parts of the computation. Here each is N, started
without waiting and waited for where its rows are needed:

    forward    to experts   0 1 2          (beside these: statistics, a parallel shared expert)
               GEMMs              0 1 2
               back                 0 1 2
    backward   the same with gradients; beside the last: gradients of the weights, and of a
               parallel shared expert

So all but the first chunk's exchange has GEMMs to hide behind. Which call follows which is fixed by
N alone, so it is the same on all ranks.

Results are those of one piece, bit for bit where a GEMM's sums do not depend on how many rows it
has: a row meets the same operands in the same GEMMs, and the gradients of weights, sums over rows,
are computed once for all chunks, over the rows in the order of one piece.

Shapes: R buffer rows, in chunks (`chunks.py`), H hidden, E experts of this rank, F their width,
M = blocks * F, P expert-parallel ranks, S rows of one expert from one rank, s those of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.operations import GatedSilu
from megatron_moe.moe.chunks import SlotChunks
from megatron_moe.moe.exchange import ExpertGroups, size_of
from megatron_moe.moe.expert_gemm import (
    GemmGroup,
    WeightGradient,
    forward_rows,
    input_gradients,
)


class _Exchange:
    """The all-to-alls of all chunks in one direction.

    Args:
        name: for the record of calls.
        flight: whose chunks.
        like_RH: a buffer of the same shape.

    Attributes:
        received_RH: what arrives, chunk by chunk.
    """

    def __init__(self, name: str, flight: Flight, like_RH: Tensor) -> None:
        self._name, self._flight = name, flight
        self.received_RH = torch.empty_like(like_RH)
        # Until it is waited for, what is sent must stay where it is.
        self._running: dict[int, tuple[dist.Work, Tensor]] = {}

    def launch(self, chunk: int, sent_RH: Tensor) -> None:
        """Start to exchange the rows of a chunk."""
        flight = self._flight
        flight.groups.clock.record(f"launch {self._name} {chunk}")
        received = flight.of_chunk(self.received_RH, chunk)
        group = flight.groups.ep
        work = dist.all_to_all_single(received, sent_RH, group=group, async_op=True)
        self._running[chunk] = work, sent_RH

    def wait(self, chunk: int) -> Tensor:
        """The rows of a chunk, when they are there; on a GPU its stream waits, not the host."""
        clock = self._flight.groups.clock
        clock.record(f"wait {self._name} {chunk}")
        with clock.measure():
            self._running.pop(chunk)[0].wait()
        return self._flight.of_chunk(self.received_RH, chunk)


class Flight:
    """The exchanges of one pass of one layer, from their launch to where they are waited for.

    Args:
        chunks: of the slots.
        experts: of this rank.
        groups: process groups of the layer; experts are not shared by ranks.
    """

    def __init__(self, chunks: SlotChunks, experts: int, groups: ExpertGroups) -> None:
        self.chunks, self.experts, self.groups = chunks, experts, groups
        self.ranks = size_of(groups.ep)
        self.bounds = chunks.bounds
        self.dispatch: _Exchange | None = None
        self.returning: _Exchange | None = None

    def of_chunk(self, buffer_RX: Tensor, chunk: int) -> Tensor:
        """The rows of a chunk."""
        all_experts = self.ranks * self.experts
        return buffer_RX[all_experts * self.bounds[chunk] : all_experts * self.bounds[chunk + 1]]

    def by_expert(self, rows_RX: Tensor) -> Tensor:
        """Rows of a chunk as they arrived, [P, E, s], by expert: [E * P * s, X]."""
        by_rank = rows_RX.view(self.ranks, self.experts, -1, rows_RX.shape[1])
        return by_rank.transpose(0, 1).reshape(-1, rows_RX.shape[1])

    def by_rank(self, rows_RX: Tensor) -> Tensor:
        """The way back."""
        by_expert = rows_RX.view(self.experts, self.ranks, -1, rows_RX.shape[1])
        return by_expert.transpose(0, 1).reshape(-1, rows_RX.shape[1])

    def whole(self, like_RX: Tensor) -> Tensor:
        """A buffer for the rows of all chunks by expert, [E, P, S, X]."""
        return like_RX.new_empty(self.experts, self.ranks, self.chunks.slots, like_RX.shape[1])

    def put(self, whole: Tensor, rows_RX: Tensor, chunk: int) -> None:
        """Copy the rows of a chunk by expert to where they are in one piece."""
        to = whole[:, :, self.bounds[chunk] : self.bounds[chunk + 1]]
        to.copy_(rows_RX.view(to.shape))

    def launch(self, rows_RH: Tensor) -> Tensor:
        """Start to send all rows to their experts.

        Returns:
            [R, H], which `overlapped` may read: rows arrive later.
        """
        return _Launch.apply(rows_RH, self)


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, flight: Flight) -> Tensor:
        ctx.flight, rows_RH = flight, rows_RH.contiguous()
        flight.dispatch = _Exchange("dispatch", flight, rows_RH)
        for chunk in range(flight.chunks.number):
            flight.dispatch.launch(chunk, flight.of_chunk(rows_RH, chunk))
        return flight.dispatch.received_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The gradient that `_Overlapped` returned is received into this memory.
        returning = ctx.flight.returning
        for chunk in range(ctx.flight.chunks.number):
            returning.wait(chunk)
        ctx.flight.returning = None
        return returning.received_RH, None


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        arriving_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        flight: Flight,
        experts: Sequence[range],
        gate: GatedSilu,
    ) -> Tensor:
        dispatch, flight.dispatch = flight.dispatch, None
        assert dispatch is not None
        ctx.flight, ctx.experts, ctx.gate = flight, experts, gate
        x_EPSH, inputs = flight.whole(arriving_RH), []
        back = _Exchange("combine", flight, arriving_RH)
        for chunk in range(flight.chunks.number):
            x_RH = flight.by_expert(dispatch.wait(chunk))
            flight.put(x_EPSH, x_RH, chunk)
            flight.groups.clock.record(f"experts {chunk}")
            groups = _groups(experts, x_RH.shape[0] // flight.experts)
            y_RH, z_RM = forward_rows(x_RH, weight_in, weight_out, groups, gate)
            inputs.append(z_RM)
            back.launch(chunk, flight.by_rank(y_RH))
        for chunk in range(flight.chunks.number):
            back.wait(chunk)
        ctx.save_for_backward(x_EPSH, weight_in, weight_out, *inputs)
        return back.received_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_EPSH, weight_in, weight_out, *inputs = ctx.saved_tensors
        flight, clock = ctx.flight, ctx.flight.groups.clock
        dy_RH = grads[0].contiguous()
        arriving, returning = (
            _Exchange(f"gradient of {name}", flight, dy_RH) for name in ("combine", "dispatch")
        )
        for chunk in range(flight.chunks.number):
            arriving.launch(chunk, flight.of_chunk(dy_RH, chunk))
        dy_EPSH, dz_EPSM, h_EPSF = (
            flight.whole(like) for like in (dy_RH, inputs[0], weight_out[0].mT)
        )
        for chunk, z_RM in enumerate(inputs):
            dy_RH = flight.by_expert(arriving.wait(chunk))
            clock.record(f"gradients of experts {chunk}")
            groups = _groups(ctx.experts, z_RM.shape[0] // flight.experts)
            dx_RH, dz_RM, h_RF = input_gradients(
                dy_RH, z_RM, weight_in, weight_out, groups, ctx.gate
            )
            returning.launch(chunk, flight.by_rank(dx_RH))
            for whole, rows in ((dy_EPSH, dy_RH), (dz_EPSM, dz_RM), (h_EPSF, h_RF)):
                flight.put(whole, rows, chunk)
        del arriving, dy_RH, dx_RH, dz_RM, h_RF
        clock.record("gradients of weights")
        groups = _groups(ctx.experts, flight.ranks * flight.chunks.slots)
        d_in = _weight_gradient(weight_in, groups, x_EPSH, dz_EPSM)
        d_out = _weight_gradient(weight_out, groups, h_EPSF, dy_EPSH)
        # `_Launch` waits, after what autograd computes between the two.
        flight.returning = returning
        return returning.received_RH, d_in, d_out, None, None, None


def _groups(experts: Sequence[range], rows: int) -> list[GemmGroup]:
    """Batched GEMMs over the same experts whatever their rows: those of one piece."""
    return [GemmGroup(each.start * rows, [each], [len(each) * rows]) for each in experts]


def _weight_gradient(
    weight: Tensor, groups: list[GemmGroup], left: Tensor, right: Tensor
) -> Tensor:
    """left^T right of each expert over all its rows."""
    gradient = WeightGradient(weight)
    left_RX, right_RY = left.flatten(0, 2), right.flatten(0, 2)
    for group in groups:
        rows = (group.split(group.of(buffer)) for buffer in (left_RX, right_RY))
        for step in gradient.products(group, *rows):
            step()
    return gradient.finish()


def overlapped(
    arriving_RH: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    flight: Flight,
    experts: Sequence[range],
    gate: GatedSilu,
) -> Tensor:
    """All experts over the rows of a flight, chunk by chunk, and the rows back to their ranks.

    Args:
        arriving_RH: from `Flight.launch`.
        weight_in: [E, H, M], blocks gate (or linear, gate) and up side by side.
        weight_out: [E, F, H].
        flight: of this pass.
        experts: neighbours that share a batched GEMM.
        gate: the kernel.

    Returns:
        [R, H]: outputs for the rows that this rank sent, in chunks.
    """
    return _Overlapped.apply(arriving_RH, weight_in, weight_out, flight, experts, gate)


def neighbours(counts: Sequence[int]) -> Iterator[range]:
    """Counts of experts as ranges of them: 2 and 1 as 0 to 1, and 2."""
    start = 0
    for count in counts:
        yield range(start, start + count)
        start += count
