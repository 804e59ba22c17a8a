"""Tokens, buffer rows and choices of every odd kind, for the tests of dispatch and combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """Choices of tokens with a row for each that is kept.

    Args:
        rows_TK: row of each choice, 0 where it is dropped.
        kept_TK: whether it is not.
        source_R: token of each row, 0 where the row is empty.
        filled_R: whether the row is not empty.
        weights_TK: fp32.
    """

    rows_TK: Tensor
    kept_TK: Tensor
    source_R: Tensor
    filled_R: Tensor
    weights_TK: Tensor


CASES = {
    "one choice": (7, 1, 9, 0.7),
    "two choices": (13, 2, 40, 0.7),
    "eight choices": (5, 8, 47, 0.6),
    "nothing dropped, no empty row": (6, 3, 18, 1.0),
    "everything dropped": (5, 2, 11, 0.0),
    "one token": (1, 2, 2, 1.0),
}
"""Tokens, choices of each, buffer rows, share that is kept."""


def routed(tokens: int, topk: int, rows: int, share: float, device: torch.device) -> Routed:
    """Choices at random, in layouts that are not contiguous."""
    generator = torch.Generator().manual_seed(tokens * 100 + rows)
    kept_TK = (torch.rand(topk, tokens, generator=generator) < share).t()
    rows_TK = torch.randperm(rows, generator=generator)[: tokens * topk].view(topk, tokens).t()
    rows_TK = rows_TK * kept_TK
    token_TK = torch.arange(tokens).unsqueeze(1).expand(-1, topk)
    source_R, filled_R = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    source_R[rows_TK[kept_TK]] = token_TK[kept_TK]
    filled_R[rows_TK[kept_TK]] = True
    weights_TK = torch.rand(topk, tokens, generator=generator).t()
    values = (rows_TK, kept_TK, source_R, filled_R, weights_TK)
    return Routed(*(x.to(device) for x in values))


def exact(out_RH: Tensor, weights_TK: Tensor, case: Routed) -> Tensor:
    """The combination by plain indexing, differentiable."""
    chosen_TKH = out_RH[case.rows_TK] * case.kept_TK.unsqueeze(2)
    return (weights_TK.unsqueeze(2) * chosen_TKH).sum(1)
