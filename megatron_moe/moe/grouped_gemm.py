"""The feed-forward layers of all experts by grouped GEMMs: only filled rows, and no host read.

A grouped GEMM (`torch.nn.functional.grouped_mm`) multiplies the rows of each expert by its weight.
Where the rows of an expert end is a tensor on the device, so the counts may be any, and shapes do
not depend on them. It needs the rows of an expert from all sources next to each other: `SortedRows`
has their order.

On a CPU `product` is a loop over experts, in any dtype and at any width. PyTorch's own function is
such a loop there too, but takes no fp64 and only rows of a multiple of 16 bytes.

As in `expert_gemm.py`, a pass saves its input rows and the gate's input. What Megatron-Core's
wrapper sums up is the gradient of a micro-batch as the grouped GEMM rounds it, to the dtype of the
weights: PyTorch's has no other output dtype, and none that adds to its output.

Shapes: R buffer rows, H hidden, E experts of this rank, F their width, M = blocks * F, N sources,
B rows of the block of one source. X and Y stand for any of H, F and M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fused_kernels.operations import GatedSilu, RankInExpert
from megatron_moe.errors import UsageError
from megatron_moe.moe.main_grad import main_grad_of

CAPABILITIES = (9, 10)
"""Major compute capabilities of GPUs for which PyTorch 2.13 has a grouped GEMM. On others it reads
the ends of groups on the host and multiplies one group after the other."""
ROW_BYTES = 16
"""What the width of a row must be a multiple of, in bytes: a GPU's bulk copies (TMA) need it."""


def check_device(device: torch.device, dtype: torch.dtype, *widths: int) -> None:
    """Whether the device has grouped GEMMs; a CPU, a fake and a meta device have `product`'s loop.

    Args:
        device: of the weights.
        dtype: of the weights.
        widths: columns of the matrices.

    Raises:
        UsageError: it has none for this dtype or these widths.
    """
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    flag, fix = "--moe-expert-impl", "use batched"
    if major not in CAPABILITIES or dtype != torch.bfloat16:
        expected = "used with --bf16 on a GPU of compute capability 9.0 or 10.0"
        found = f"grouped with {str(dtype).partition('.')[2]} on {major}.{minor}"
        raise UsageError(flag, found, expected, fix)
    for width in widths:
        if width * dtype.itemsize % ROW_BYTES:
            least = ROW_BYTES // dtype.itemsize
            expected = f"used with widths that are multiples of {least}"
            raise UsageError(flag, f"grouped with a width of {width}", expected, fix)


def product(rows_RX: Tensor, weight_EXY: Tensor, ends_E: Tensor) -> Tensor:
    """The rows of each expert times its weight, [R, Y]; rows past the last end are arbitrary.

    Args:
        rows_RX: sorted by expert.
        weight_EXY: stacked weights, or their transposes as a view.
        ends_E: int32, one past the last row of each expert.
    """
    if not is_readable(rows_RX):
        return F.grouped_mm(rows_RX, weight_EXY, offs=ends_E)
    out_RY = rows_RX.new_zeros(rows_RX.shape[0], weight_EXY.shape[2])
    start = 0
    for weight_XY, end in zip(weight_EXY, ends_E.tolist(), strict=True):
        torch.mm(rows_RX[start:end], weight_XY, out=out_RY[start:end])
        start = end
    return out_RY


def product_over_rows(left_RX: Tensor, right_RY: Tensor, ends_E: Tensor) -> Tensor:
    """left^T right over the rows of each expert, [E, X, Y]; zero for one without rows."""
    if not is_readable(left_RX):
        return F.grouped_mm(left_RX.mT, right_RY, offs=ends_E)
    out_EXY = left_RX.new_zeros(len(ends_E), left_RX.shape[1], right_RY.shape[1])
    start = 0
    for out_XY, end in zip(out_EXY, ends_E.tolist(), strict=True):
        torch.mm(left_RX[start:end].mT, right_RY[start:end], out=out_XY)
        start = end
    return out_EXY


def is_readable(x: Tensor) -> bool:
    """Whether reading values of ``x`` needs no waiting: a CPU tensor that is not a fake one."""
    return x.device.type == "cpu" and type(x.detach()) is Tensor


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        ends_E: Tensor,
        gate: GatedSilu,
    ) -> Tensor:
        ctx.blocks, ctx.gate = weight_in.shape[2] // weight_out.shape[1], gate
        z_RM = product(x_RH, weight_in, ends_E)
        ctx.save_for_backward(x_RH, z_RM, weight_in, weight_out, ends_E)
        return product(gate.forward(z_RM, ctx.blocks), weight_out, ends_E)

    # The formulas are those of `expert_gemm.py`; here one GEMM is over all experts.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_RH, z_RM, weight_in, weight_out, ends_E = ctx.saved_tensors
        dy_RH = grads[0].contiguous()
        dh_RF = product(dy_RH, weight_out.mT, ends_E)
        dz_RM, h_RF = ctx.gate.backward(dh_RF, z_RM, ctx.blocks)
        d_out = _gradient(weight_out, product_over_rows(h_RF, dy_RH, ends_E))
        dx_RH = product(dz_RM, weight_in.mT, ends_E)
        d_in = _gradient(weight_in, product_over_rows(x_RH, dz_RM, ends_E))
        return dx_RH, d_in, d_out, None, None


def _gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """What autograd gets for a weight: the gradient, unless it was added to `main_grad`."""
    main = main_grad_of(weight)
    if main is None or main.dtype not in (grad.dtype, torch.float32) or grad.dtype.itemsize > 4:
        return grad
    main.add_(grad)
    # As `added_to_main_grad` does; what is returned is not read, and memory of its own is saved.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return grad


def grouped(
    x_RH: Tensor, weight_in: Tensor, weight_out: Tensor, ends_E: Tensor, gate: GatedSilu
) -> Tensor:
    """All experts over rows that are sorted by expert.

    Args:
        x_RH: the rows.
        weight_in: [E, H, M], blocks gate (or linear, gate) and up side by side.
        weight_out: [E, F, H].
        ends_E: int32, one past the last row of each expert.
        gate: the kernel.

    Returns:
        [R, H]; arbitrary past the last end, as is the gradient of ``x_RH`` there.
    """
    return _Grouped.apply(x_RH, weight_in, weight_out, ends_E, gate)


@dataclass
class Arrival:
    """Rows that a dispatcher brings sorted by expert, however many there are of each.

    Args:
        ends_E: int32, one past the last row of each expert; set when they arrive.
    """

    ends_E: Tensor | None = None


@dataclass(frozen=True)
class SortedRows:
    """The rows that arrived, in the order of their experts.

    Two sources with blocks of 4 rows, of which they filled 2 and 1 for expert 0, 1 and 1 for expert
    1: rows 0 to 7 are of experts 0 0 1 - 0 1 - -. Sorted they are 0 1 4 | 2 5 | 3 6 7, with ends 3
    and 5.

    Args:
        arrived_R: int64, which of the rows that arrived is in each place.
        place_R: int64, its inverse: the place of each row that arrived.
        ends_E: int32, one past the last place of each expert.
    """

    arrived_R: Tensor
    place_R: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, counts_NE: Tensor, block_rows: int, kernel: RankInExpert) -> SortedRows:
        """From the rows that each source filled for each expert.

        Args:
            counts_NE: int64; a block has its experts one after the other, then its empty rows.
            block_rows: B.
            kernel: of the device.
        """
        sources, experts = counts_NE.shape
        row_NB = torch.arange(block_rows, device=counts_NE.device).repeat(sources, 1)
        # How many experts end at or before a row: its expert, or E where the block is empty.
        expert_1R = torch.searchsorted(counts_NE.cumsum(1), row_NB, right=True).view(1, -1)
        rank_1R, load_1X = kernel.forward(expert_1R, experts + 1)
        ends_1X = load_1X.cumsum(1)
        place_R = ((ends_1X - load_1X).gather(1, expert_1R) + rank_1R).view(-1)
        row_R = torch.arange(place_R.shape[0], device=place_R.device)
        arrived_R = torch.empty_like(place_R).scatter_(0, place_R, row_R)
        return cls(arrived_R, place_R, ends_1X[0, :experts].int())

    def sort(self, rows_RH: Tensor) -> Tensor:
        """Rows as they arrived -> sorted by expert."""
        return _Permute.apply(rows_RH, self.arrived_R, self.place_R)

    def unsort(self, rows_RH: Tensor) -> Tensor:
        """The way back."""
        return _Permute.apply(rows_RH, self.place_R, self.arrived_R)


class _Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is a gather too, with the inverse order."""

    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RH.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None
