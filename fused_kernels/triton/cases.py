"""Every operation at the size of one model, with the bytes that its kernels move.

For the tool that compiles all kernels ahead of time, and for the benchmark on a GPU. `moved` counts
what a kernel loads and stores, a row that it loads twice twice; `least` counts every operand and
every result once. Both leave out what torch itself does: clearing a buffer, a last sum.

Shapes: T tokens, K choices of a token, E experts, G capacity groups, A = K T / G choices of a
group, R buffer rows, H hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_kernels.triton import combine_tokens, dispatch_tokens, gated_silu, rank_in_expert

INDEX, FLAG, WIDE = 8, 1, 4
"""Bytes of an int64, a bool, an fp32."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A micro-batch in one MoE layer of a model.

    Args:
        tokens: T.
        topk: K.
        experts: E.
        groups: G.
        slots: of an expert for each group, so that R = E G slots.
        hidden: H.
        ffn: F.
        dtype: of activations.
    """

    tokens: int
    topk: int
    experts: int
    groups: int
    slots: int
    hidden: int
    ffn: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        """R."""
        return self.experts * self.groups * self.slots

    @property
    def choices(self) -> int:
        """K T, which all have a row."""
        return self.topk * self.tokens

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.hidden * self.dtype.itemsize


OPENMOE_8B = Size(tokens=8192, topk=2, experts=32, groups=4, slots=160, hidden=2048, ffn=8192)
"""OpenMoE-8B with four rows of 2048 tokens and capacity factor 1.25: R = 20480."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pass of an operation.

    Args:
        name: e.g. `dispatch_tokens.forward`.
        run: makes its operands on a device, and returns the call that runs it.
        moved: bytes that its kernels load and store.
        least: bytes that they would if every operand and result moved once.
        copies_rows: whether it must load and store 128 bits at once.
    """

    name: str
    run: Callable[[Size, torch.device], Callable[[], object]]
    moved: Callable[[Size], int]
    least: Callable[[Size], int]
    copies_rows: bool = False


def values(size: Size, device: torch.device, *shape: int) -> Tensor:
    """Activations; on the `meta` device without values."""
    return torch.ones(shape, dtype=size.dtype, device=device)


def choices_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, rows and kept [T, K], and the token of each row [R].

    All choices are kept. The rows of a token are far from each other, as those of two experts are,
    and the empty rows are spread evenly.
    """
    shape, rows = (size.tokens, size.topk), size.rows
    choice_KT = torch.arange(size.choices, device=device).view(size.topk, size.tokens)
    rows_TK = (choice_KT * rows // size.choices).t().contiguous()
    source_R = torch.zeros(rows, dtype=torch.long, device=device)
    token_TK = torch.arange(size.tokens, device=device).unsqueeze(1).expand(shape)
    source_R.scatter_(0, rows_TK.view(-1), token_TK.reshape(-1))
    kept_TK = torch.ones(shape, dtype=torch.bool, device=device)
    weights_TK = torch.ones(shape, dtype=torch.float32, device=device)
    return weights_TK, rows_TK, kept_TK, source_R


def _dispatch(size: Size, device: torch.device) -> Callable[[], object]:
    x_TH, source_R = values(size, device, size.tokens, size.hidden), choices_of(size, device)[3]
    return lambda: dispatch_tokens.forward(x_TH, source_R)


def _dispatch_backward(size: Size, device: torch.device) -> Callable[[], object]:
    grad_RH = values(size, device, size.rows, size.hidden)
    _, rows_TK, kept_TK, _ = choices_of(size, device)
    return lambda: dispatch_tokens.backward(grad_RH, rows_TK, kept_TK)


def _combine(size: Size, device: torch.device) -> Callable[[], object]:
    out_RH = values(size, device, size.rows, size.hidden)
    choices = choices_of(size, device)[:3]
    return lambda: combine_tokens.forward(out_RH, *choices)


def _combine_backward(size: Size, device: torch.device) -> Callable[[], object]:
    out_RH = values(size, device, size.rows, size.hidden)
    grad_TH, choices = values(size, device, size.tokens, size.hidden), choices_of(size, device)
    return lambda: combine_tokens.backward(grad_TH, out_RH, *choices)


def _ranks(size: Size, device: torch.device) -> Callable[[], object]:
    shape = (size.groups, size.choices // size.groups)
    experts_GA = torch.zeros(shape, dtype=torch.long, device=device)
    return lambda: rank_in_expert.forward(experts_GA, size.experts)


def _gate(blocks: int) -> Callable[[Size, torch.device], Callable[[], object]]:
    def run(size: Size, device: torch.device) -> Callable[[], object]:
        z_RM = values(size, device, size.rows, blocks * size.ffn)
        return lambda: gated_silu.forward(z_RM, blocks)

    return run


def _gate_backward(blocks: int) -> Callable[[Size, torch.device], Callable[[], object]]:
    def run(size: Size, device: torch.device) -> Callable[[], object]:
        z_RM = values(size, device, size.rows, blocks * size.ffn)
        grad_RF = values(size, device, size.rows, size.ffn)
        return lambda: gated_silu.backward(grad_RF, z_RM, blocks)

    return run


def _gate_bytes(operands: int) -> Callable[[Size], int]:
    """Of so many operands of F columns."""
    return lambda size: size.rows * size.ffn * operands * size.dtype.itemsize


def _rank_bytes(size: Size) -> int:
    """Ranks are written by tile and corrected; counts of the tiles are summed in between."""
    tile = rank_in_expert.TILE
    tiles = size.groups * -(-(size.choices // size.groups) // tile)
    counts = WIDE * size.experts * tiles
    by_tile = size.choices * (2 * INDEX + WIDE)
    summed = 2 * counts + INDEX * size.groups * size.experts
    return by_tile + summed + size.choices * (3 * INDEX + WIDE)


def _combine_backward_bytes(size: Size) -> int:
    """For each token its choices, its gradient, its rows; for each row the choices of its token."""
    by_token = size.choices * (INDEX + FLAG + 2 * WIDE) + size.tokens * size.row
    written = (size.choices + size.rows) * size.row
    by_row = size.rows * (INDEX + size.topk * (INDEX + FLAG))
    return by_token + written + by_row


CASES = (
    Case(
        name="dispatch_tokens.forward",
        run=_dispatch,
        moved=lambda s: s.rows * (INDEX + 2 * s.row),
        least=lambda s: s.rows * (INDEX + s.row) + s.tokens * s.row,
        copies_rows=True,
    ),
    Case(
        name="dispatch_tokens.backward",
        run=_dispatch_backward,
        moved=lambda s: s.choices * (INDEX + FLAG + s.row) + s.tokens * s.row,
        least=lambda s: s.choices * (INDEX + FLAG + s.row) + s.tokens * s.row,
        copies_rows=True,
    ),
    Case(
        name="combine_tokens.forward",
        run=_combine,
        moved=lambda s: s.choices * (INDEX + FLAG + WIDE + s.row) + s.tokens * s.row,
        least=lambda s: s.choices * (INDEX + FLAG + WIDE + s.row) + s.tokens * s.row,
        copies_rows=True,
    ),
    Case(
        name="combine_tokens.backward",
        run=_combine_backward,
        moved=_combine_backward_bytes,
        least=lambda s: s.choices * (INDEX + FLAG + 2 * WIDE + s.row) + (s.tokens + s.rows) * s.row,
        copies_rows=True,
    ),
    Case(
        name="rank_in_expert.forward",
        run=_ranks,
        moved=_rank_bytes,
        least=lambda s: s.choices * 2 * INDEX + s.groups * s.experts * INDEX,
    ),
    *(
        Case(
            name=f"gated_silu.forward, {blocks} blocks",
            run=_gate(blocks),
            moved=_gate_bytes(blocks + 1),
            least=_gate_bytes(blocks + 1),
            copies_rows=True,
        )
        for blocks in (2, 3)
    ),
    *(
        Case(
            name=f"gated_silu.backward, {blocks} blocks",
            run=_gate_backward(blocks),
            moved=_gate_bytes(2 * blocks + 2),
            least=_gate_bytes(2 * blocks + 2),
            copies_rows=True,
        )
        for blocks in (2, 3)
    ),
)
