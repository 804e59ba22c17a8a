"""The feed-forward layers of all experts, forward and backward, two ways.

`loop`: one GEMM per expert over its filled rows, written in place into slices of the buffer and of
the stacked weight gradient. No empty row is computed. It needs the row counts on the host.
`batched`: one batched GEMM over the whole fixed-shape buffer. Nothing is read by the host.

Both keep only the input rows and the gate's input for the backward pass; the gated product is made
again there. When the engine's data-parallel wrapper has given a weight its `main_grad`, gradients
are accumulated straight into it, by the engine's own protocol (`grad_added_to_main_grad`).

Shapes: R buffer rows, H hidden, E experts of this rank, F their width, M = blocks * F.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LEAST_GATE_ELEMENTS = 1 << 18
"""Elements of the gated product below which experts share one call of the gate. Sixteen experts of
64 x 512 in two calls rather than sixteen."""


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``start + rows`` of the buffer belong to ``expert`` of this rank."""

    expert: int
    start: int
    rows: int


def segments_of(counts: list[list[int]], block_rows: int) -> list[Segment]:
    """The filled rows of a packed buffer.

    Args:
        counts: for each source rank, rows filled for each expert.
        block_rows: rows of the block of one source, filled or not.
    """
    segments = []
    for source, filled in enumerate(counts):
        start = source * block_rows
        for expert, rows in enumerate(filled):
            if rows:
                segments.append(Segment(expert, start, rows))
            start += rows
    return segments


@dataclass
class _Run:
    """Neighbouring segments whose gate is computed in one go; ``rows`` in all."""

    start: int
    experts: list[int]
    sizes: list[int]
    rows: int

    def of(self, buffer_RX: Tensor) -> Tensor:
        """Its rows of a buffer."""
        return buffer_RX.narrow(0, self.start, self.rows)

    def multiply(self, left_RX: Tensor, weights: tuple[Tensor, ...], out_RY: Tensor) -> None:
        """Out = left times the weight of each row's expert; both are this run's rows."""
        lefts, outs = left_RX.split(self.sizes), out_RY.split(self.sizes)
        for expert, left, out in zip(self.experts, lefts, outs, strict=True):
            torch.mm(left, weights[expert], out=out)


def _runs(segments: list[Segment], width: int) -> list[_Run]:
    """Neighbours joined until a run has `LEAST_GATE_ELEMENTS`: small experts share gate calls."""
    runs: list[_Run] = []
    end = -1
    for segment in segments:
        if segment.start == end and runs[-1].rows * width < LEAST_GATE_ELEMENTS:
            runs[-1].experts.append(segment.expert)
            runs[-1].sizes.append(segment.rows)
            runs[-1].rows += segment.rows
        else:
            runs.append(_Run(segment.start, [segment.expert], [segment.rows], segment.rows))
        end = segment.start + segment.rows
    return runs


def _zero_gaps(buffer_RX: Tensor, segments: list[Segment]) -> Tensor:
    """Zero the rows outside all segments, so that no uninitialised value ever leaves."""
    end = 0
    for segment in segments:
        if segment.start > end:
            buffer_RX[end : segment.start].zero_()
        end = segment.start + segment.rows
    buffer_RX[end:].zero_()
    return buffer_RX


class _WeightGradient:
    """Where the gradient of a stacked weight goes: a new tensor, or the engine's `main_grad`."""

    def __init__(self, weight: Tensor) -> None:
        main: Tensor | None = getattr(weight, "main_grad", None)
        if getattr(weight, "grad_added_to_main_grad", None) is None:
            main = None  # Not wrapped by the engine: nobody would clear or read it.
        self.weight = weight
        self.fused = main is not None and main.dtype == weight.dtype
        self.target = main if main is not None and self.fused else torch.empty_like(weight)
        self.each = self.target.unbind()
        self.started: set[int] = set(range(weight.shape[0])) if self.fused else set()

    def add(self, run: _Run, left_RX: Tensor, right_RY: Tensor) -> None:
        """Add left^T right of each expert of a run, whose rows these are."""
        lefts, rights = left_RX.t().split(run.sizes, dim=1), right_RY.split(run.sizes)
        for expert, left, right in zip(run.experts, lefts, rights, strict=True):
            if expert in self.started:
                torch.addmm(self.each[expert], left, right, out=self.each[expert])
            else:
                torch.mm(left, right, out=self.each[expert])
                self.started.add(expert)

    def add_batch(self, first: int, left_ERX: Tensor, right_ERY: Tensor) -> None:
        """Add left^T right of the experts from ``first`` on, whose rows these are."""
        end = first + left_ERX.shape[0]
        left_EXR = left_ERX.transpose(1, 2)
        if self.fused:
            self.target[first:end].baddbmm_(left_EXR, right_ERY)
        else:
            torch.bmm(left_EXR, right_ERY, out=self.target[first:end])
            self.started.update(range(first, end))

    def finish(self) -> Tensor:
        """What the autograd function returns for the weight."""
        if self.fused:
            # The engine asks for some gradient and, seeing the flag, does not read it.
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            return torch.empty_like(self.weight)
        for expert in set(range(self.target.shape[0])) - self.started:
            self.target[expert].zero_()
        return self.target


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        segments: list[Segment],
        gate: ModuleType,
    ) -> Tensor:
        width = weight_out.shape[1]
        ctx.blocks = weight_in.shape[2] // width
        ctx.segments, ctx.gate = segments, gate
        z_RM = x_RH.new_empty(x_RH.shape[0], weight_in.shape[2])
        y_RH = _zero_gaps(torch.empty_like(x_RH), segments)
        runs = _runs(segments, width)
        h_RF = x_RH.new_empty(max((run.rows for run in runs), default=0), width)
        w_in, w_out = weight_in.unbind(), weight_out.unbind()
        for run in runs:
            z, h = run.of(z_RM), h_RF[: run.rows]
            run.multiply(run.of(x_RH), w_in, z)
            gate.forward(z, ctx.blocks, out=h)
            run.multiply(h, w_out, run.of(y_RH))
        ctx.save_for_backward(x_RH, z_RM, weight_in, weight_out)
        return y_RH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_RH, z_RM, weight_in, weight_out = ctx.saved_tensors
        dy_RH, width = grads[0], weight_out.shape[1]
        d_in, d_out = _WeightGradient(weight_in), _WeightGradient(weight_out)
        dx_RH = _zero_gaps(torch.empty_like(x_RH), ctx.segments)
        runs = _runs(ctx.segments, width)
        most = max((run.rows for run in runs), default=0)
        dh_RF, h_RF = (z_RM.new_empty(most, width) for _ in range(2))
        dz_RM = z_RM.new_empty(most, z_RM.shape[1])
        w_in, w_out = (w.transpose(1, 2).unbind() for w in (weight_in, weight_out))
        for run in runs:
            dh, h, dz = dh_RF[: run.rows], h_RF[: run.rows], dz_RM[: run.rows]
            run.multiply(run.of(dy_RH), w_out, dh)
            ctx.gate.backward(dh, run.of(z_RM), ctx.blocks, grad_z=dz, out=h)
            d_out.add(run, h, run.of(dy_RH))
            run.multiply(dz, w_in, run.of(dx_RH))
            d_in.add(run, run.of(x_RH), dz)
        return dx_RH, d_in.finish(), d_out.finish(), None, None


@dataclass(frozen=True)
class Portion:
    """Neighbouring experts of one batched GEMM, each with ``rows`` rows of the buffer."""

    experts: int
    rows: int


def portions_of(rows: list[int], width: int, threads: int = 0) -> list[Portion]:
    """Which experts share a batched GEMM.

    A batched GEMM gives each thread whole experts. With few of them at a time, what it made is
    still in the thread's cache when the gate comes, and an expert is padded to the fullest of few.

    Args:
        rows: of each expert, at least.
        width: F, columns of the gated product.
        threads: of the CPU; 0: one GEMM for all.
    """
    step = len(rows)
    if threads:
        share = 2 * LEAST_GATE_ELEMENTS / max(1, max(rows) * width * threads)
        step = threads * max(1, round(share))
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return [Portion(len(part), max(part)) for part in parts]


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        portions: list[Portion],
        gate: ModuleType,
    ) -> Tensor:
        width, y_RH = weight_out.shape[1], torch.empty_like(x_RH)
        ctx.blocks, ctx.gate, ctx.portions = weight_in.shape[2] // width, gate, portions
        z_RM = x_RH.new_empty(x_RH.shape[0], weight_in.shape[2])
        h_RF = x_RH.new_empty(_most_rows(portions), width)
        # Cut once for all portions: a view of each in each turn costs more than a small gate.
        weights = (_by_portion(w, portions) for w in (weight_in, weight_out))
        rows = (_rows_of(t, portions) for t in (x_RH, z_RM, y_RH))
        for portion, w_in, w_out, x, z, y in zip(portions, *weights, *rows, strict=True):
            h = h_RF[: z.shape[0]]
            torch.bmm(_split(x, portion), w_in, out=_split(z, portion))
            gate.forward(z, ctx.blocks, out=h)
            torch.bmm(_split(h, portion), w_out, out=_split(y, portion))
        ctx.save_for_backward(x_RH, z_RM, weight_in, weight_out)
        return y_RH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_RH, z_RM, weight_in, weight_out = ctx.saved_tensors
        dy_RH, dx_RH = grads[0].contiguous(), torch.empty_like(x_RH)
        d_in, d_out = _WeightGradient(weight_in), _WeightGradient(weight_out)
        most = _most_rows(ctx.portions)
        dh_RF, h_RF = (z_RM.new_empty(most, weight_out.shape[1]) for _ in range(2))
        dz_RM, first = z_RM.new_empty(most, z_RM.shape[1]), 0
        weights = (_by_portion(w.transpose(1, 2), ctx.portions) for w in (weight_in, weight_out))
        rows = (_rows_of(t, ctx.portions) for t in (x_RH, z_RM, dy_RH, dx_RH))
        for portion, w_in, w_out, x, z, dy, dx in zip(ctx.portions, *weights, *rows, strict=True):
            dh, h, dz = (t[: z.shape[0]] for t in (dh_RF, h_RF, dz_RM))
            x, dy, dx = (_split(t, portion) for t in (x, dy, dx))
            torch.bmm(dy, w_out, out=_split(dh, portion))
            ctx.gate.backward(dh, z, ctx.blocks, grad_z=dz, out=h)
            d_out.add_batch(first, _split(h, portion), dy)
            torch.bmm(_split(dz, portion), w_in, out=dx)
            d_in.add_batch(first, x, _split(dz, portion))
            first += portion.experts
        return dx_RH, d_in.finish(), d_out.finish(), None, None


def _most_rows(portions: list[Portion]) -> int:
    return max(portion.experts * portion.rows for portion in portions)


def _by_portion(weight_EXY: Tensor, portions: list[Portion]) -> tuple[Tensor, ...]:
    return weight_EXY.split([portion.experts for portion in portions])


def _rows_of(buffer_RX: Tensor, portions: list[Portion]) -> tuple[Tensor, ...]:
    return buffer_RX.split([portion.experts * portion.rows for portion in portions])


def _split(rows_RX: Tensor, portion: Portion) -> Tensor:
    """Rows of a portion by expert."""
    return rows_RX.view(portion.experts, portion.rows, rows_RX.shape[1])


def loop(
    x_RH: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    segments: list[Segment],
    gate: ModuleType,
) -> Tensor:
    """All experts over a packed buffer.

    Args:
        x_RH: the buffer.
        weight_in: [E, H, M], blocks gate (linear, gate), up side by side.
        weight_out: [E, F, H].
        segments: filled rows, in order of their start.
        gate: the `gated_silu` kernel.

    Returns:
        [R, H]; zero outside the segments.
    """
    return _Loop.apply(x_RH, weight_in, weight_out, segments, gate)


def batched(
    x_RH: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    portions: list[Portion],
    gate: ModuleType,
) -> Tensor:
    """All experts over a buffer in which neighbours have as many rows.

    Args:
        x_RH: the buffer.
        weight_in: as for `loop`.
        weight_out: as for `loop`.
        portions: all experts in order; their rows make up the buffer.
        gate: the `gated_silu` kernel.

    Returns:
        [R, H].
    """
    return _Batched.apply(x_RH, weight_in, weight_out, portions, gate)
