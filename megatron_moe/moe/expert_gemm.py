"""The feed-forward layers of all experts, forward and backward, two ways.

`loop`: one GEMM per expert over its filled rows, written in place into slices of the buffer and of
the stacked weight gradient. No empty row is computed. It needs the row counts on the host.
`batched`: one batched GEMM over the whole fixed-shape buffer. Nothing is read by the host.

Both go through the experts in turns, so that what a GEMM made is still in the cache when the gate
comes. They keep only the input rows and the gate's input for the backward pass; the gated product
is made again there. When the engine's data-parallel wrapper has given a weight its `main_grad`,
gradients are accumulated straight into it, by the engine's protocol (`grad_added_to_main_grad`).

Shapes: R buffer rows, H hidden, E experts of this rank, F their width, M = blocks * F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]
"""A GEMM or a gate, its views made beforehand: a GEMM leaves little of the interpreter in a core's
cache, so what it does between two of them is slow. A gate of 480 x 1024 that follows a GEMM takes
0.30 ms so on a CPU with 2 threads, and 0.50 ms if it makes its views itself."""
LEAST_GATE_ELEMENTS = 1 << 19
"""Elements of the gated product below which experts share one call of the gate. Sixteen experts of
64 x 512 in one call rather than sixteen."""


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


@dataclass(frozen=True)
class _Turn:
    """Neighbouring rows of the buffer that are computed before the next ones.

    Args:
        start: the first.
        experts: of each GEMM: one, or neighbours with as many rows each.
        sizes: rows of each GEMM.
    """

    start: int
    experts: Sequence[int | range]
    sizes: Sequence[int]

    @property
    def rows(self) -> int:
        """In all."""
        return sum(self.sizes)

    def of(self, buffer_RX: Tensor) -> Tensor:
        """Its rows of a buffer."""
        return _part(buffer_RX, self.start, self.rows)

    def cut(self, rows_RX: Tensor) -> list[Tensor]:
        """Its rows as each GEMM takes them: [R, X], or by expert."""
        parts = [rows_RX] if len(self.sizes) == 1 else rows_RX.split(self.sizes)
        return [
            part if isinstance(e, int) else part.view(len(e), size // len(e), part.shape[1])
            for e, size, part in zip(self.experts, self.sizes, parts, strict=True)
        ]

    def weights(self, weight_EXY: Tensor) -> list[Tensor]:
        """What each GEMM takes of a stacked weight."""
        return [
            weight_EXY.select(0, e) if isinstance(e, int) else _part(weight_EXY, e.start, len(e))
            for e in self.experts
        ]


def _part(stack: Tensor, start: int, length: int) -> Tensor:
    """A part of the first dimension; no view where it is all of it."""
    return stack if length == stack.shape[0] else stack.narrow(0, start, length)


def _products(lefts: list[Tensor], rights: list[Tensor], outs: list[Tensor]) -> Iterator[Step]:
    """Each out = left times right."""
    for left, right, out in zip(lefts, rights, outs, strict=True):
        yield partial(torch.mm if out.dim() == 2 else torch.bmm, left, right, out=out)


def _runs(segments: list[Segment], width: int) -> list[_Turn]:
    """Neighbours joined until a turn has `LEAST_GATE_ELEMENTS`: small experts share gate calls."""
    runs: list[list[Segment]] = []
    end = -1
    for segment in segments:
        full = runs and sum(s.rows for s in runs[-1]) * width >= LEAST_GATE_ELEMENTS
        if segment.start != end or full:
            runs.append([])
        runs[-1].append(segment)
        end = segment.start + segment.rows
    return [_Turn(run[0].start, [s.expert for s in run], [s.rows for s in run]) for run in runs]


class _WeightGradient:
    """Where the gradient of a stacked weight goes: a new tensor, or the engine's `main_grad`."""

    def __init__(self, weight: Tensor) -> None:
        main: Tensor | None = getattr(weight, "main_grad", None)
        if getattr(weight, "grad_added_to_main_grad", None) is None:
            main = None  # Not wrapped by the engine: nobody would clear or read it.
        self.weight = weight
        self.fused = main is not None and main.dtype == weight.dtype
        self.target = main if main is not None and self.fused else torch.empty_like(weight)
        self.started: set[int] = set(range(weight.shape[0])) if self.fused else set()

    def products(self, turn: _Turn, lefts: list[Tensor], rights: list[Tensor]) -> Iterator[Step]:
        """Add left^T right of each expert of a turn, whose rows these are."""
        targets = turn.weights(self.target)
        for experts, left, right, out in zip(turn.experts, lefts, rights, targets, strict=True):
            each = {experts} if isinstance(experts, int) else {*experts}
            plain, add = (torch.mm, torch.addmm) if out.dim() == 2 else (torch.bmm, torch.baddbmm)
            if each <= self.started:
                yield partial(add, out, left.mT, right, out=out)
            else:
                yield partial(plain, left.mT, right, out=out)
                self.started |= each

    def finish(self) -> Tensor:
        """What the autograd function returns for the weight."""
        if self.fused:
            # The engine asks for some gradient and, seeing the flag, does not read it.
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            return torch.empty_like(self.weight)
        for expert in set(range(self.target.shape[0])) - self.started:
            self.target[expert].zero_()
        return self.target


def _zero_gaps(buffer_RX: Tensor, turns: list[_Turn]) -> Tensor:
    """Zero the rows outside all turns, so that no uninitialised value ever leaves."""
    end = 0
    for turn in turns:
        if turn.start > end:
            buffer_RX[end : turn.start].zero_()
        end = turn.start + turn.rows
    buffer_RX[end:].zero_()
    return buffer_RX


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        turns: list[_Turn],
        gate: ModuleType,
    ) -> Tensor:
        width = weight_out.shape[1]
        ctx.blocks, ctx.gate, ctx.turns = weight_in.shape[2] // width, gate, turns
        z_RM = x_RH.new_empty(x_RH.shape[0], weight_in.shape[2])
        y_RH = _zero_gaps(torch.empty_like(x_RH), turns)
        h_RF = x_RH.new_empty(_most_rows(turns), width)
        steps: list[Step] = []
        for turn in turns:
            x, z, y = (turn.of(buffer) for buffer in (x_RH, z_RM, y_RH))
            h = _part(h_RF, 0, turn.rows)
            steps += _products(turn.cut(x), turn.weights(weight_in), turn.cut(z))
            steps.append(gate.forward_step(z, ctx.blocks, h))
            steps += _products(turn.cut(h), turn.weights(weight_out), turn.cut(y))
        for step in steps:
            step()
        ctx.save_for_backward(x_RH, z_RM, weight_in, weight_out)
        return y_RH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_RH, z_RM, weight_in, weight_out = ctx.saved_tensors
        dy_RH, most, width = grads[0].contiguous(), _most_rows(ctx.turns), weight_out.shape[1]
        d_in, d_out = _WeightGradient(weight_in), _WeightGradient(weight_out)
        dx_RH = _zero_gaps(torch.empty_like(x_RH), ctx.turns)
        memory = [z_RM.new_empty(most, n) for n in (width, width, z_RM.shape[1])]
        back_in, back_out = weight_in.mT, weight_out.mT
        steps: list[Step] = []
        for turn in ctx.turns:
            x, z, dy, dx = (turn.of(buffer) for buffer in (x_RH, z_RM, dy_RH, dx_RH))
            dh, h, dz = (_part(buffer, 0, turn.rows) for buffer in memory)
            gate = ctx.gate.backward_step(dh, z, ctx.blocks, dz, h)
            xs, dys, dxs, dhs, hs, dzs = map(turn.cut, (x, dy, dx, dh, h, dz))
            steps += [*_products(dys, turn.weights(back_out), dhs), gate]
            steps += d_out.products(turn, hs, dys)
            steps += _products(dzs, turn.weights(back_in), dxs)
            steps += d_in.products(turn, xs, dzs)
        for step in steps:
            step()
        return dx_RH, d_in.finish(), d_out.finish(), None, None


def _most_rows(turns: list[_Turn]) -> int:
    return max((turn.rows for turn in turns), default=0)


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
    turns = _runs(segments, weight_out.shape[1])
    return _Experts.apply(x_RH, weight_in, weight_out, turns, gate)


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
    turns, row, expert = [], 0, 0
    for portion in portions:
        experts, rows = range(expert, expert + portion.experts), portion.experts * portion.rows
        turns.append(_Turn(row, [experts], [rows]))
        row, expert = row + rows, experts.stop
    return _Experts.apply(x_RH, weight_in, weight_out, turns, gate)
