"""The gate of a feed-forward layer: silu(gate) * up, or linear * silu(gate) * up, in one pass.

As `fused_kernels.reference.gated_silu`, which describes the blocks. Elements are computed in fp32
and rounded once.

Shapes: R rows, M = blocks * F, F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows
from fused_kernels.gate_passes import whole_backward, whole_forward, wide_shape
from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import gated_silu as reference
from fused_kernels.triton.fp8 import (
    check_device,
    constants_of,
    converted,
    empty_rows,
    finished,
    magnitude,
    scale_arguments,
    store_blocks,
)
from fused_kernels.triton.launch import (
    block_of,
    cdiv,
    checked,
    computed,
    launch,
    warps_of,
)

OVERWRITES_GRADIENT = False
"""`backward` leaves its first argument as it is."""
COLUMNS = 1024
"""Of h that a program computes."""
FP8_COLUMNS = 2048
"""The same with a result in FP8: 16 bytes of it for each thread of 4 warps."""


@triton.jit
def gate_value(
    at: tl.tensor,
    width: tl.tensor,
    inside: tl.tensor,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """h, of inputs whose first block starts ``at``; zero where it is not ``inside``."""
    gate = tl.load(at + (BLOCKS - 2) * width, mask=inside, other=0.0).to(WIDE)
    up = tl.load(at + (BLOCKS - 1) * width, mask=inside, other=0.0).to(WIDE)
    value = gate * tl.sigmoid(gate) * up
    if BLOCKS == 3:
        value *= tl.load(at, mask=inside, other=0.0).to(WIDE)
    return value


@triton.jit
def gated_silu_kernel(
    z: tl.tensor,
    h: tl.tensor,
    width: tl.tensor,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for `BLOCK` columns of a row."""
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = gate_value(z + row * BLOCKS * width + column, width, inside, BLOCKS, WIDE)
    tl.store(h + row * width + column, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu_fp8_kernel(
    z: tl.tensor,
    h: tl.tensor,
    factors: tl.tensor,
    amax: tl.tensor,
    width: tl.tensor,
    part_rows: tl.tensor,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    PER: tl.constexpr,
    MOST: tl.constexpr,
    INVERSE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program for `BLOCK` columns of a row, which are rounded to the dtype of z and quantised.

    With blocks (``PER`` is not 0) ``factors`` is written. Else it is read, a scale for each
    ``part_rows`` rows, and ``amax`` gets the bits of the program's largest magnitude.
    """
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < width
    value = gate_value(z + row * BLOCKS * width + column, width, inside, BLOCKS, WIDE)
    value = value.to(z.dtype.element_ty).to(tl.float32)
    if PER:
        store_blocks(value, h, factors, row, start, width, PER, MOST, INVERSE, LIMIT, BLOCK)
    else:
        scaled = value * tl.load(factors + row // part_rows)
        found = converted(scaled, MOST, h.dtype.element_ty)
        tl.store(h + row * width + column, found, mask=inside)
        tl.store(amax + tl.program_id(0), tl.max(magnitude(value), 0))


@triton.jit
def gated_silu_backward_kernel(
    grad: tl.tensor,
    z: tl.tensor,
    dz: tl.tensor,
    h: tl.tensor,
    width: tl.tensor,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_H: tl.constexpr,
) -> None:
    """A program for `BLOCK` columns of a row: gradients of all blocks, and h if it is wanted."""
    parts = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    narrow, wide = row * width + column, row * BLOCKS * width + column
    gate_at, up_at = wide + (BLOCKS - 2) * width, wide + (BLOCKS - 1) * width
    gate = tl.load(z + gate_at, mask=inside, other=0.0).to(WIDE)
    up = tl.load(z + up_at, mask=inside, other=0.0).to(WIDE)
    slope = tl.load(grad + narrow, mask=inside, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value, to_gate, to_up = silu * up, slope * up, slope * silu
    element = dz.dtype.element_ty
    if BLOCKS == 3:
        linear = tl.load(z + wide, mask=inside, other=0.0).to(WIDE)
        tl.store(dz + wide, (slope * value).to(element), mask=inside)
        value, to_gate, to_up = value * linear, to_gate * linear, to_up * linear
    to_gate *= sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dz + gate_at, to_gate.to(element), mask=inside)
    tl.store(dz + up_at, to_up.to(element), mask=inside)
    if WITH_H:
        tl.store(h + narrow, value.to(element), mask=inside)


def forward(z_RM: Tensor, blocks: int) -> Tensor:
    """The gated product, h_RF."""
    return whole_forward(forward_step, z_RM, blocks)


def forward_step(z_RM: Tensor, blocks: int, h_RF: Tensor) -> Callable[[], None]:
    """`forward` into ``h_RF`` when the result is called."""
    if not runs_on(z_RM, h_RF):
        return reference.forward_step(z_RM, blocks, h_RF)
    _fit(blocks, h_RF, [h_RF], [z_RM])
    return _step(gated_silu_kernel, {"z": z_RM, "h": h_RF}, blocks, {})


def forward_fp8(z_RM: Tensor, blocks: int, output: Fp8Output) -> Fp8Rows:
    """`forward`, quantised in the same pass."""
    if not runs_on(z_RM):
        return reference.forward_fp8(z_RM, blocks, output)
    check_device("gated_silu", z_RM.device)
    rows, width = z_RM.shape[0], z_RM.shape[1] // blocks
    block = max(block_of(width, FP8_COLUMNS), output.block)
    result = empty_rows(output, z_RM, rows, width, cdiv(width, block))
    wide_shape(result.values, blocks)
    arguments: dict[str, Tensor | int] = {
        "z": checked("gated_silu", z_RM, (rows, blocks * width)),
        "h": result.values,
        "width": width,
        **scale_arguments(output, result),
    }
    constants = {
        "BLOCKS": blocks,
        "WIDE": computed(z_RM.dtype),
        "BLOCK": block,
        **constants_of(output, z_RM.dtype),
    }
    programs = rows * cdiv(width, block)
    launch(gated_silu_fp8_kernel, programs, arguments, constants, warps_of(block))
    return finished(result)


def backward(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and the forward result once more: grad_RM, h_RF."""
    return whole_backward(backward_step, grad_RF, z_RM, blocks)


def gradient(grad_RF: Tensor, z_RM: Tensor, blocks: int) -> Tensor:
    """grad_RM of `backward` alone."""
    if not runs_on(grad_RF, z_RM):
        return reference.gradient(grad_RF, z_RM, blocks)
    grad_RM, grad_RF = z_RM.new_empty(z_RM.shape), grad_RF.contiguous()
    z_RM = z_RM.contiguous()
    _fit(blocks, grad_RF, [grad_RF], [z_RM, grad_RM])
    # Nothing is written to `h`, but the kernel is started by its shape.
    operands = {"grad": grad_RF, "z": z_RM, "dz": grad_RM, "h": grad_RF}
    _step(gated_silu_backward_kernel, operands, blocks, {"WITH_H": False})()
    return grad_RM


def backward_step(
    grad_RF: Tensor, z_RM: Tensor, blocks: int, grad_RM: Tensor, h_RF: Tensor
) -> Callable[[], None]:
    """`backward` into ``grad_RM`` and ``h_RF`` when the result is called."""
    if not runs_on(grad_RF, z_RM, grad_RM, h_RF):
        return reference.backward_step(grad_RF, z_RM, blocks, grad_RM, h_RF)
    _fit(blocks, h_RF, [grad_RF, h_RF], [z_RM, grad_RM])
    operands = {"grad": grad_RF, "z": z_RM, "dz": grad_RM, "h": h_RF}
    return _step(gated_silu_backward_kernel, operands, blocks, {"WITH_H": True})


def _step(
    kernel: Callable[..., object],
    operands: dict[str, Tensor],
    blocks: int,
    more: dict[str, bool],
) -> Callable[[], None]:
    """The launch of a kernel over all of h."""
    h_RF = operands["h"]
    width = h_RF.shape[-1]
    block = block_of(width, COLUMNS)
    programs = h_RF.numel() // max(1, width) * cdiv(width, block)
    constants = {"BLOCKS": blocks, "WIDE": computed(h_RF.dtype), "BLOCK": block, **more}

    def step() -> None:
        # A vector of 16 bytes of bf16 for each thread: with two, registers limit the occupancy.
        launch(kernel, programs, {**operands, "width": width}, constants, warps_of(block, 8))

    return step


def _fit(blocks: int, h_RF: Tensor, narrow: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """Check operands of F columns and operands of M.

    Raises:
        ValueError: one has another shape or dtype, or is not contiguous, so that a kernel would
            read or write other memory.
    """
    all_of_M = wide_shape(h_RF, blocks)
    for x in narrow:
        checked("gated_silu", x, h_RF.shape)
    for x in wide:
        checked("gated_silu", x, all_of_M)
    for x in (*narrow, *wide):
        if not x.is_contiguous() or x.dtype != h_RF.dtype:
            found = f"{x.dtype}, strides {x.stride()}"
            raise ValueError(f"gated_silu: expected contiguous {h_RF.dtype}, found {found}")
