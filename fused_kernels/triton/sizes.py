"""The size at which kernels are compiled and measured, and what a case is.

Shapes: T tokens, K choices of a token, E experts, G capacity groups, R buffer rows, H hidden,
F width of an expert, N heads, D head dimension, V vocabulary columns of a rank, C tokens of a chunk
of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CAPABILITIES = (80, 90, 100)
"""Of the devices that kernels are compiled for: A100; H100 and H200; B200."""
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
        heads: N.
        head_dim: D.
        columns: V.
        chunk: C.
        dtype: of activations.
    """

    tokens: int
    topk: int
    experts: int
    groups: int
    slots: int
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    columns: int
    chunk: int
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

    @property
    def head_row(self) -> int:
        """Bytes of the queries of a token."""
        return self.heads * self.head_dim * self.dtype.itemsize

    @property
    def table(self) -> int:
        """Bytes of the router's table of tokens and experts."""
        return self.tokens * self.experts * WIDE


OPENMOE_8B = Size(
    tokens=8192,
    topk=2,
    experts=32,
    groups=4,
    slots=160,
    hidden=2048,
    ffn=8192,
    heads=24,
    head_dim=128,
    columns=64096,
    chunk=1024,
)
"""OpenMoE-8B with four rows of 2048 tokens and capacity factor 1.25: R = 20480. Logits of one of
four tensor-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pass of an operation.

    Args:
        name: e.g. `dispatch_tokens.forward`.
        run: makes its operands on a device, and returns the call that runs it.
        moved: bytes that its kernels load and store.
        least: bytes that they would if every operand and result moved once.
        copies_rows: whether it must load and store 128 bits at once.
        capabilities: of the devices that it runs on.
        writes_fp8: whether it must convert to FP8 by the device's own instructions.
    """

    name: str
    run: Callable[[Size, torch.device], Callable[[], object]]
    moved: Callable[[Size], int]
    least: Callable[[Size], int]
    copies_rows: bool = False
    capabilities: tuple[int, ...] = CAPABILITIES
    writes_fp8: bool = False


def values(size: Size, device: torch.device, *shape: int) -> Tensor:
    """Activations; on the `meta` device without values."""
    return torch.ones(shape, dtype=size.dtype, device=device)


def choices_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, rows and kept [T, K], and the token of each row [R], -1 where there is none.

    All choices are kept. The rows of a token are far from each other, as those of two experts are,
    and the empty rows are spread evenly.
    """
    shape, rows = (size.tokens, size.topk), size.rows
    choice_KT = torch.arange(size.choices, device=device).view(size.topk, size.tokens)
    rows_TK = (choice_KT * rows // size.choices).t().contiguous()
    source_R = torch.full((rows,), -1, device=device)
    token_TK = torch.arange(size.tokens, device=device).unsqueeze(1).expand(shape)
    source_R.scatter_(0, rows_TK.view(-1), token_TK.reshape(-1))
    kept_TK = torch.ones(shape, dtype=torch.bool, device=device)
    weights_TK = torch.ones(shape, dtype=torch.float32, device=device)
    return weights_TK, rows_TK, kept_TK, source_R
