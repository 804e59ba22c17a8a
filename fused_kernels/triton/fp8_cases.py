"""Operations with a result in FP8: what they move, and the devices that have FP8.

Shapes: R buffer rows, E experts, H hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fused_kernels.fp8.output import Fp8Output, Scaling
from fused_kernels.fp8.rules import BLOCK, E4M3, MX_BLOCK
from fused_kernels.triton import dispatch_tokens, gated_silu
from fused_kernels.triton.launch import block_of, cdiv
from fused_kernels.triton.sizes import INDEX, WIDE, Case, Size, choices_of, values

CONVERTS_TO_FP8 = (90, 100)
"""Compute capabilities with an instruction for e4m3; 8.0 has none."""
SCALINGS: tuple[Scaling, ...] = ("given", "blockwise", "mxfp8")


def _output(size: Size, device: torch.device, scaling: Scaling) -> Fp8Output:
    """Given scales are one for each expert."""
    scale = torch.ones(size.experts, device=device) if scaling == "given" else None
    return Fp8Output(dtype=E4M3, scaling=scaling, scale=scale)


def _dispatch(scaling: Scaling) -> Callable[[Size, torch.device], Callable[[], object]]:
    def run(size: Size, device: torch.device) -> Callable[[], object]:
        x_TH, source_R = values(size, device, size.tokens, size.hidden), choices_of(size, device)[3]
        output = _output(size, device, scaling)
        return lambda: dispatch_tokens.forward_fp8(x_TH, source_R, output)

    return run


def _gate(blocks: int, scaling: Scaling) -> Callable[[Size, torch.device], Callable[[], object]]:
    def run(size: Size, device: torch.device) -> Callable[[], object]:
        z_RM = values(size, device, size.rows, blocks * size.ffn)
        output = _output(size, device, scaling)
        return lambda: gated_silu.forward_fp8(z_RM, blocks, output)

    return run


def _row(width: int, scaling: Scaling) -> int:
    """Bytes of a row in FP8 with its factors."""
    factors = {"given": 0, "blockwise": WIDE * cdiv(width, BLOCK), "mxfp8": cdiv(width, MX_BLOCK)}
    return width + factors[scaling]


def _scales(scaling: Scaling, number: int) -> int:
    """Bytes of so many given scales that are read and largest magnitudes that are written."""
    return 2 * WIDE * number if scaling == "given" else 0


def _dispatch_bytes(scaling: Scaling, moved: bool) -> Callable[[Size], int]:
    """Each row of the buffer reads its token and its expert's scale; at least, each once."""

    def count(size: Size) -> int:
        tokens, scales = (size.choices, size.rows) if moved else (size.tokens, size.experts)
        written = size.rows * (INDEX + _row(size.hidden, scaling))
        return written + tokens * size.row + _scales(scaling, scales)

    return count


def _gate_bytes(blocks: int, scaling: Scaling, moved: bool) -> Callable[[Size], int]:
    """Each program reads its expert's scale; at least, each scale is read once."""

    def count(size: Size) -> int:
        parts = cdiv(size.ffn, block_of(size.ffn, gated_silu.FP8_COLUMNS))
        scales = size.rows * parts if moved else size.experts
        read = size.rows * blocks * size.ffn * size.dtype.itemsize
        return read + size.rows * _row(size.ffn, scaling) + _scales(scaling, scales)

    return count


FP8_CASES = (
    *(
        Case(
            name=f"dispatch_tokens.forward_fp8, {scaling}",
            run=_dispatch(scaling),
            moved=_dispatch_bytes(scaling, True),
            least=_dispatch_bytes(scaling, False),
            copies_rows=True,
            capabilities=CONVERTS_TO_FP8,
            writes_fp8=True,
        )
        for scaling in SCALINGS
    ),
    *(
        Case(
            name=f"gated_silu.forward_fp8, {blocks} blocks, {scaling}",
            run=_gate(blocks, scaling),
            moved=_gate_bytes(blocks, scaling, True),
            least=_gate_bytes(blocks, scaling, False),
            copies_rows=True,
            capabilities=CONVERTS_TO_FP8,
            writes_fp8=True,
        )
        for blocks in (2, 3)
        for scaling in SCALINGS
    ),
)
