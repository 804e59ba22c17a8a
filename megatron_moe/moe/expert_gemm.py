"""The feed-forward layers of all experts, forward and backward, two ways.

`loop`: one GEMM per expert over its filled rows, written in place into slices of the buffer and of
the stacked weight gradient. No empty row is computed. It needs the row counts on the host.
`batched`: one batched GEMM over several experts with as many rows each. Nothing is read by the
host.

Both compute one `GemmGroup` of rows after the other, through all GEMMs of a pass, so that what a
GEMM writes is still in the cache when the gate reads it. They save only the input rows and the
gate's input for the backward pass, which computes the gated product again. When Megatron-Core's
data-parallel wrapper has given a weight its `main_grad`, gradients are accumulated straight into
it, by Megatron-Core's protocol (`main_grad.py`); in fp32 also where weights are bf16.

Shapes: R buffer rows (or rows of one group), H hidden, E experts of this rank, F their width,
M = blocks * F. X and Y stand for any of H, F and M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.operations import GatedSilu
from megatron_moe.moe.main_grad import added_to_main_grad, main_grad_of

Step = Callable[[], object]
"""A GEMM or a gate, its views made beforehand. A GEMM evicts the interpreter from a core's cache,
so Python between two GEMMs is slow: a gate of 480 x 1024 that follows a GEMM takes 0.30 ms this
way on a CPU with 2 threads, and 0.50 ms if it makes its views itself."""
LEAST_GATE_ELEMENTS = 1 << 19
"""Elements of the gated product below which experts share one call of the gate. Sixteen experts of
64 x 512 in one call rather than sixteen."""


@dataclass(frozen=True)
class ExpertRows:
    """Rows ``start`` to ``start + rows`` of the buffer belong to ``expert`` of this rank."""

    expert: int
    start: int
    rows: int


def filled_rows(counts: list[list[int]], block_rows: int) -> list[ExpertRows]:
    """The filled rows of a packed buffer, in order.

    Args:
        counts: for each source rank, rows filled for each expert.
        block_rows: rows of the block of one source, filled or not.
    """
    filled = []
    for source, counts_E in enumerate(counts):
        start = source * block_rows
        for expert, rows in enumerate(counts_E):
            if rows:
                filled.append(ExpertRows(expert, start, rows))
            start += rows
    return filled


@dataclass(frozen=True)
class ExpertBucket:
    """Neighbouring experts of one batched GEMM, each with ``rows`` rows of the buffer."""

    experts: int
    rows: int


def make_buckets(rows: list[int], width: int, threads: int = 0) -> list[ExpertBucket]:
    """Which experts share a batched GEMM.

    A batched GEMM gives each thread whole experts. With few experts per bucket, what it writes is
    still in the thread's cache when the gate reads it, and an expert is padded to the fullest of
    few. With 2 threads and experts so large that a bucket is 2 of them, rows [3, 5, 2, 0, 7] give
    buckets of 2 x 5, 2 x 2 and 1 x 7 rows: 21 for 17 filled ones, where one bucket would have 35.

    Args:
        rows: of each expert, at least.
        width: F, columns of the gated product.
        threads: of the CPU; 0: one GEMM for all experts.
    """
    step = len(rows)
    if threads:
        share = 2 * LEAST_GATE_ELEMENTS / max(1, max(rows) * width * threads)
        step = threads * max(1, round(share))
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    return [ExpertBucket(len(part), max(part)) for part in parts]


@dataclass(frozen=True)
class GemmGroup:
    """Neighbouring rows of the buffer that pass through all GEMMs before the next group does.

    A group of two single GEMMs over rows 4 to 8, 3 of expert 0 and 2 of expert 1, is
    `GemmGroup(4, [0, 1], [3, 2])`; a batched GEMM over the same experts, padded to 3 rows each, is
    `GemmGroup(4, [range(0, 2)], [6])`.

    Args:
        start: first row.
        experts: of each GEMM: one, or neighbours with as many rows each.
        sizes: rows of each GEMM.
    """

    start: int
    experts: Sequence[int | range]
    sizes: Sequence[int]

    @property
    def rows(self) -> int:
        """Rows of all its GEMMs."""
        return sum(self.sizes)

    def of(self, buffer_RX: Tensor) -> Tensor:
        """Its rows of a buffer."""
        return _part(buffer_RX, self.start, self.rows)

    def split(self, rows_RX: Tensor) -> list[Tensor]:
        """Its rows as each GEMM takes them: [rows, X], or [experts, rows of each, X]."""
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


def _groups(filled: list[ExpertRows], width: int) -> list[GemmGroup]:
    """Neighbours joined up to `LEAST_GATE_ELEMENTS`: small experts share a call of the gate."""
    runs: list[list[ExpertRows]] = []
    end = -1
    for rows in filled:
        full = runs and sum(r.rows for r in runs[-1]) * width >= LEAST_GATE_ELEMENTS
        if rows.start != end or full:
            runs.append([])
        runs[-1].append(rows)
        end = rows.start + rows.rows
    return [GemmGroup(run[0].start, [r.expert for r in run], [r.rows for r in run]) for run in runs]


_HALVES = (torch.bfloat16, torch.float16)


def _adds_to(main: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of operands of a dtype can be added to ``main`` without rounding them."""
    return main.dtype == dtype or (main.dtype == torch.float32 and dtype in _HALVES)


def _added(out: Tensor, left: Tensor, right: Tensor) -> Step:
    """Add left^T right to ``out``, products and sums in the dtype of ``out``.

    A GPU's GEMM takes bf16 operands and adds to fp32 (cuBLAS; `out_dtype`). PyTorch has no such
    GEMM for CPUs: the operands of one GEMM, a few rows, are copied to fp32, which is exact too, and
    their products are added by an fp32 GEMM. The result differs by the order of sums alone.
    """
    add: Callable[..., Tensor] = torch.addmm if out.dim() == 2 else torch.baddbmm
    if out.dtype == left.dtype:
        return partial(add, out, left.mT, right, out=out)
    if out.is_cuda:
        return partial(add, out, left.mT, right, out_dtype=out.dtype, out=out)

    def step() -> None:
        add(out, left.mT.to(out.dtype), right.to(out.dtype), out=out)

    return step


class WeightGradient:
    """The gradient of a stacked weight: a new tensor, or Megatron-Core's `main_grad`.

    A new tensor is uninitialized. The first product of an expert overwrites its slice, later ones
    (its rows from other source ranks) add to it, and `finish` zeroes the slices of experts without
    rows: one pass over memory less than starting from zeros. `main_grad` holds the sum of earlier
    micro-batches, so every product adds to it.
    """

    def __init__(self, weight: Tensor) -> None:
        main = main_grad_of(weight)
        self.weight = weight
        self.fused = main is not None and _adds_to(main, weight.dtype)
        self.target = main if main is not None and self.fused else torch.empty_like(weight)
        self.started: set[int] = set(range(weight.shape[0])) if self.fused else set()

    def products(
        self, group: GemmGroup, lefts: list[Tensor], rights: list[Tensor]
    ) -> Iterator[Step]:
        """Add left^T right of each expert of a group."""
        targets = group.weights(self.target)
        for experts, left, right, out in zip(group.experts, lefts, rights, targets, strict=True):
            each = {experts} if isinstance(experts, int) else {*experts}
            if each <= self.started:
                yield _added(out, left, right)
            else:
                yield partial(torch.mm if out.dim() == 2 else torch.bmm, left.mT, right, out=out)
                self.started |= each

    def finish(self) -> Tensor:
        """The gradient that the autograd function returns for the weight."""
        if self.fused:
            return added_to_main_grad(self.weight)
        for expert in set(range(self.target.shape[0])) - self.started:
            self.target[expert].zero_()
        return self.target


def _zero_gaps(buffer_RX: Tensor, groups: list[GemmGroup]) -> Tensor:
    """Zero the rows outside all groups, so that no uninitialized value leaves the function."""
    end = 0
    for group in groups:
        if group.start > end:
            buffer_RX[end : group.start].zero_()
        end = group.start + group.rows
    buffer_RX[end:].zero_()
    return buffer_RX


def forward_rows(
    x_RH: Tensor, weight_in: Tensor, weight_out: Tensor, groups: list[GemmGroup], gate: GatedSilu
) -> tuple[Tensor, Tensor]:
    """The outputs, [R, H], zero outside the groups, and the gate's input, [R, M]."""
    width = weight_out.shape[1]
    blocks = weight_in.shape[2] // width
    z_RM = x_RH.new_empty(x_RH.shape[0], weight_in.shape[2])
    y_RH = _zero_gaps(torch.empty_like(x_RH), groups)
    # Every group writes its gated product over the last one's: it stays in the cache.
    h_RF = x_RH.new_empty(_most_rows(groups), width)
    steps: list[Step] = []
    for group in groups:
        x, z, y = (group.of(buffer) for buffer in (x_RH, z_RM, y_RH))
        h = _part(h_RF, 0, group.rows)
        steps += _products(group.split(x), group.weights(weight_in), group.split(z))
        steps.append(gate.forward_step(z, blocks, h))
        steps += _products(group.split(h), group.weights(weight_out), group.split(y))
    for step in steps:
        step()
    return y_RH, z_RM


def input_gradients(
    dy_RH: Tensor,
    z_RM: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    groups: list[GemmGroup],
    gate: GatedSilu,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the rows, and what those of the weights are computed from.

    Args:
        dy_RH: gradient of the outputs.
        z_RM: the gate's input.
        weight_in: as for `batched`.
        weight_out: likewise.
        groups: they have all rows.
        gate: the kernel.

    Returns:
        dx [R, H], dz [R, M] and h [R, F].
    """
    blocks = weight_in.shape[2] // weight_out.shape[1]
    dx_RH, dz_RM = torch.empty_like(dy_RH), torch.empty_like(z_RM)
    dh_RF, h_RF = (z_RM.new_empty(z_RM.shape[0], weight_out.shape[1]) for _ in range(2))
    steps: list[Step] = []
    for group in groups:
        buffers = (dy_RH, dh_RF, z_RM, dz_RM, h_RF, dx_RH)
        dy, dh, z, dz, h, dx = (group.of(buffer) for buffer in buffers)
        steps += _products(group.split(dy), group.weights(weight_out.mT), group.split(dh))
        steps.append(gate.backward_step(dh, z, blocks, dz, h))
        steps += _products(group.split(dz), group.weights(weight_in.mT), group.split(dx))
    for step in steps:
        step()
    return dx_RH, dz_RM, h_RF


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        groups: list[GemmGroup],
        gate: GatedSilu,
    ) -> Tensor:
        ctx.blocks, ctx.gate = weight_in.shape[2] // weight_out.shape[1], gate
        ctx.groups = groups
        y_RH, z_RM = forward_rows(x_RH, weight_in, weight_out, groups, gate)
        ctx.save_for_backward(x_RH, z_RM, weight_in, weight_out)
        return y_RH

    # Forward, for each expert: z = x W_in, h = gate(z), y = h W_out. Hence, with ' the transpose:
    #   dh = dy W_out'          dW_out = h' dy
    #   dz = gate's gradient    dx = dz W_in'          dW_in = x' dz
    # h was not saved: the gate's backward has z at hand and computes h again, which costs less
    # than writing it in the forward pass and reading it here. So the order within a group is fixed:
    # dh, the gate (dz and h), and then the three GEMMs that use these. dh, h and dz are memory for
    # the largest group, which the next group overwrites; the reference gate also overwrites dh.
    #
    # An example: three experts with 2, 0 and 1 filled rows, small enough to share a gate call, are
    # one group of two GEMMs. Its steps are: dh of expert 0, dh of expert 2, the gate over 3 rows,
    # dW_out of 0 and 2, dx of 0 and 2, dW_in of 0 and 2. Expert 1 gets its zeros from `finish`, and
    # rows of dx that no group covers theirs from `_zero_gaps`.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_RH, z_RM, weight_in, weight_out = ctx.saved_tensors
        dy_RH, most, width = grads[0].contiguous(), _most_rows(ctx.groups), weight_out.shape[1]
        d_in, d_out = WeightGradient(weight_in), WeightGradient(weight_out)
        dx_RH = _zero_gaps(torch.empty_like(x_RH), ctx.groups)
        memory = [z_RM.new_empty(most, n) for n in (width, width, z_RM.shape[1])]
        back_in, back_out = weight_in.mT, weight_out.mT
        steps: list[Step] = []
        for group in ctx.groups:
            x, z, dy, dx = (group.of(buffer) for buffer in (x_RH, z_RM, dy_RH, dx_RH))
            dh, h, dz = (_part(buffer, 0, group.rows) for buffer in memory)
            gate = ctx.gate.backward_step(dh, z, ctx.blocks, dz, h)
            xs, dys, dxs, dhs, hs, dzs = map(group.split, (x, dy, dx, dh, h, dz))
            steps += [*_products(dys, group.weights(back_out), dhs), gate]
            steps += d_out.products(group, hs, dys)
            steps += _products(dzs, group.weights(back_in), dxs)
            steps += d_in.products(group, xs, dzs)
        for step in steps:
            step()
        return dx_RH, d_in.finish(), d_out.finish(), None, None


def _most_rows(groups: list[GemmGroup]) -> int:
    return max((group.rows for group in groups), default=0)


def loop(
    x_RH: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    filled: list[ExpertRows],
    gate: GatedSilu,
) -> Tensor:
    """All experts over a packed buffer, one GEMM each.

    Args:
        x_RH: the buffer.
        weight_in: [E, H, M], blocks gate (or linear, gate) and up side by side.
        weight_out: [E, F, H].
        filled: filled rows, in order of their start.
        gate: the kernel.

    Returns:
        [R, H]; zero outside the filled rows.
    """
    groups = _groups(filled, weight_out.shape[1])
    return _Experts.apply(x_RH, weight_in, weight_out, groups, gate)


def batched(
    x_RH: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    buckets: Sequence[ExpertBucket],
    gate: GatedSilu,
) -> Tensor:
    """All experts over a buffer in which the experts of a bucket have as many rows each.

    Args:
        x_RH: the buffer.
        weight_in: as for `loop`.
        weight_out: as for `loop`.
        buckets: all experts in order; their rows make up the buffer.
        gate: the kernel.

    Returns:
        [R, H].
    """
    groups, row, expert = [], 0, 0
    for bucket in buckets:
        experts, rows = range(expert, expert + bucket.experts), bucket.experts * bucket.rows
        groups.append(GemmGroup(row, [experts], [rows]))
        row, expert = row + rows, experts.stop
    return _Experts.apply(x_RH, weight_in, weight_out, groups, gate)
