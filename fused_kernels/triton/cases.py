"""Every operation at the size of one model, with the bytes that its kernels move.

For the tool that compiles all kernels ahead of time, and for the benchmark on a GPU. `moved` counts
what a kernel loads and stores, a row that it loads twice twice; `least` counts every operand and
every result once. Both leave out what torch itself does: clearing a buffer, a last sum.

Shapes: T tokens, K choices of a token, E experts, G capacity groups, A = K T / G choices of a
group, R buffer rows, H hidden, F width of an expert, N heads, D head dimension, V vocabulary
columns of a rank, C tokens of a chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_kernels.triton import (
    combine_tokens,
    dispatch_tokens,
    gated_silu,
    linear_cross_entropy,
    rank_in_expert,
    rms_norm,
    rotary,
    router,
)
from fused_kernels.triton.fp8_cases import FP8_CASES
from fused_kernels.triton.sizes import FLAG, INDEX, WIDE, Case, Size, choices_of, values


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
    grad_TH = values(size, device, size.tokens, size.hidden)
    weights_TK, rows_TK, kept_TK, source_R = choices_of(size, device)
    choices = weights_TK, rows_TK, kept_TK, source_R.clamp_(min=0)
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


def _gate_gradient(blocks: int) -> Callable[[Size, torch.device], Callable[[], object]]:
    def run(size: Size, device: torch.device) -> Callable[[], object]:
        z_RM = values(size, device, size.rows, blocks * size.ffn)
        grad_RF = values(size, device, size.rows, size.ffn)
        return lambda: gated_silu.gradient(grad_RF, z_RM, blocks)

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


def _norm(size: Size, device: torch.device) -> Callable[[], object]:
    x_TH = values(size, device, size.tokens, size.hidden)
    return lambda: rms_norm.forward(x_TH, x_TH[0], 1e-6)


def _norm_backward(size: Size, device: torch.device) -> Callable[[], object]:
    x_TH = values(size, device, size.tokens, size.hidden)
    inverse_T1 = torch.ones(size.tokens, 1, device=device)
    return lambda: rms_norm.backward(x_TH, x_TH, x_TH[0], inverse_T1)


def _norm_parts(size: Size) -> int:
    """Programs of the norm's backward pass."""
    each = max(1, -(-size.tokens // rms_norm.PARTS))
    return -(-size.tokens // each)


def _norm_programs(size: Size) -> int:
    """Programs of the norm's forward pass, each of which reads the scale, mostly from a cache."""
    tile = max(1, rms_norm.ELEMENTS // _padded(size.hidden))
    return -(-size.tokens // tile)


def _padded(width: int) -> int:
    """The least power of two that holds so many."""
    return 1 << (width - 1).bit_length()


def _rotary(size: Size, device: torch.device) -> Callable[[], object]:
    length = size.tokens // size.groups
    fused = values(size, device, length, size.groups, size.heads, 3 * size.head_dim)
    angles = torch.ones(length, size.head_dim // 2, device=device)
    return lambda: rotary.forward(fused[..., : size.head_dim], angles, angles)


def _rotary_angles(size: Size) -> int:
    """Bytes of sines and cosines of every program: those of a token are the same in all rows."""
    together = min(_padded(size.heads), rotary.ELEMENTS // _padded(size.head_dim // 2))
    return size.tokens * -(-size.heads // together) * size.head_dim * WIDE


def _router(size: Size, device: torch.device) -> Callable[[], object]:
    logits_ET = torch.ones(size.experts, size.tokens, device=device)
    return lambda: router.forward(logits_ET, size.topk)


def _router_backward(size: Size, device: torch.device) -> Callable[[], object]:
    probs_ET = torch.ones(size.experts, size.tokens, device=device)
    choices_KT = torch.zeros(size.topk, size.tokens, dtype=torch.long, device=device)
    weights_KT = torch.ones(size.topk, size.tokens, device=device)
    slopes = probs_ET[0], probs_ET.t().contiguous().t(), weights_KT
    return lambda: router.backward(*slopes, probs_ET, choices_KT)


def _loss_sums(size: Size, device: torch.device) -> Callable[[], object]:
    probs_ET = torch.ones(size.experts, size.tokens, device=device)
    load_QE = torch.ones(size.groups, size.experts, dtype=torch.long, device=device)
    return lambda: router.loss_sums(probs_ET.t(), probs_ET[0], load_QE)


def _loss_bytes(size: Size) -> int:
    """The loads of a token's part are read for each token, from a cache."""
    programs = -(-size.tokens // max(8, min(128, router.ELEMENTS // _padded(size.experts))))
    loads = size.tokens * size.experts * INDEX
    return size.table + loads + size.tokens * WIDE + 2 * WIDE * programs


def _logits(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a chunk, targets, and two numbers of each token."""
    logits_CV = torch.ones(size.chunk, size.columns, device=device)
    target_C = torch.zeros(size.chunk, dtype=torch.long, device=device)
    return logits_CV, target_C, torch.ones(3, size.chunk, device=device)


def _logits_stats(size: Size, device: torch.device) -> Callable[[], object]:
    logits_CV, target_C, stats_3C = _logits(size, device)
    return lambda: linear_cross_entropy.statistics(logits_CV, target_C, stats_3C, size.chunk)


def _logits_grad(size: Size, device: torch.device) -> Callable[[], object]:
    logits_CV, target_C, numbers_3C = _logits(size, device)
    grad_CV = torch.empty(size.chunk, size.columns, dtype=size.dtype, device=device)
    given = logits_CV, target_C, numbers_3C[2], numbers_3C
    return lambda: linear_cross_entropy.gradients(*given, size.chunk, grad_CV)


def _choice_bytes(size: Size) -> int:
    """Of the choices, their weights and the logarithms of all tokens."""
    return size.choices * (INDEX + WIDE) + size.tokens * WIDE


CASES = (
    Case(
        name="dispatch_tokens.forward",
        run=_dispatch,
        moved=lambda s: s.rows * (INDEX + s.row) + s.choices * s.row,
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
    *(
        Case(
            name=f"gated_silu.gradient, {blocks} blocks",
            run=_gate_gradient(blocks),
            moved=_gate_bytes(2 * blocks + 1),
            least=_gate_bytes(2 * blocks + 1),
            copies_rows=True,
        )
        for blocks in (2, 3)
    ),
    *FP8_CASES,
    Case(
        name="rms_norm.forward",
        run=_norm,
        moved=lambda s: (2 * s.tokens + _norm_programs(s)) * s.row + s.tokens * WIDE,
        least=lambda s: (2 * s.tokens + 1) * s.row + s.tokens * WIDE,
        copies_rows=True,
    ),
    Case(
        name="rms_norm.backward",
        run=_norm_backward,
        moved=lambda s: (
            (3 * s.tokens + _norm_parts(s)) * s.row
            + s.tokens * WIDE
            + _norm_parts(s) * s.hidden * WIDE
        ),
        least=lambda s: (3 * s.tokens + 2) * s.row + s.tokens * WIDE,
        copies_rows=True,
    ),
    Case(
        name="rotary.forward",
        run=_rotary,
        moved=lambda s: 2 * s.tokens * s.head_row + _rotary_angles(s),
        least=lambda s: 2 * s.tokens * s.head_row + s.tokens // s.groups * s.head_dim * WIDE,
        copies_rows=True,
    ),
    Case(
        name="router.forward",
        run=_router,
        moved=lambda s: 3 * s.table + _choice_bytes(s),
        least=lambda s: 3 * s.table + _choice_bytes(s),
    ),
    Case(
        name="router.backward",
        run=_router_backward,
        moved=lambda s: 3 * s.table + _choice_bytes(s),
        least=lambda s: 3 * s.table + _choice_bytes(s),
    ),
    Case(
        name="router.loss_sums",
        run=_loss_sums,
        moved=_loss_bytes,
        least=lambda s: s.table + s.tokens * WIDE + s.groups * s.experts * INDEX + 2 * WIDE,
    ),
    Case(
        name="linear_cross_entropy.statistics",
        run=_logits_stats,
        # The target's logit is read once more.
        moved=lambda s: s.chunk * ((s.columns + 4) * WIDE + INDEX),
        least=lambda s: s.chunk * ((s.columns + 3) * WIDE + INDEX),
    ),
    Case(
        name="linear_cross_entropy.gradients",
        run=_logits_grad,
        moved=lambda s: s.chunk * (s.columns * (WIDE + s.dtype.itemsize) + 3 * WIDE + INDEX),
        least=lambda s: s.chunk * (s.columns * (WIDE + s.dtype.itemsize) + 3 * WIDE + INDEX),
    ),
)
