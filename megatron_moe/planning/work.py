"""The arithmetic of each part of a layer on one rank, and the bytes that its kernels move.

A matrix product is its shape; everything else is bytes, each kernel reading its inputs and writing
its outputs once. Nothing is known of a device here: `step_time.py` turns work into time.

Letters as in `tensor_sizes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_moe.planning.tensor_sizes import TensorSizes

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Gemm:
    """``batch`` products of [m, k] and [k, n]."""

    m: int
    n: int
    k: int
    batch: int = 1
    precision: Precision = "bf16"

    @property
    def flops(self) -> int:
        """A multiply-add counts two."""
        return 2 * self.m * self.n * self.k * self.batch

    @property
    def gradients(self) -> tuple[Gemm, Gemm]:
        """Of the left operand, [m, n] [n, k], and of the right one, [k, m] [m, n]."""
        return (
            Gemm(self.m, self.k, self.n, self.batch, self.precision),
            Gemm(self.k, self.n, self.m, self.batch, self.precision),
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """One pass of one unit for one micro-batch."""

    gemms: tuple[Gemm, ...] = ()
    attention_flops: int = 0
    """Of the fused kernel, the causal half alone."""
    bytes: int = 0
    """Moved by all other kernels."""
    kernels: int = 0
    """How many are started."""

    @property
    def flops(self) -> int:
        """All arithmetic of matrix products."""
        return self.attention_flops + sum(gemm.flops for gemm in self.gemms)

    def __add__(self, other: Work) -> Work:
        return Work(
            gemms=self.gemms + other.gemms,
            attention_flops=self.attention_flops + other.attention_flops,
            bytes=self.bytes + other.bytes,
            kernels=self.kernels + other.kernels,
        )


@dataclass(frozen=True)
class UnitWork:
    """Both passes of one unit."""

    forward: Work
    backward: Work
    """Without what recomputation repeats."""

    @classmethod
    def of(
        cls, gemms: tuple[Gemm, ...], moved: int, kernels: int, attention_flops: int = 0
    ) -> UnitWork:
        """Backward, each product has two gradients, and other kernels move twice as much.

        The backward pass of fused attention has five products for the two of the forward pass, as
        it computes the scores again (arXiv 2205.14135).
        """
        gradients = tuple(gradient for gemm in gemms for gradient in gemm.gradients)
        return cls(
            Work(gemms=gemms, attention_flops=attention_flops, bytes=moved, kernels=kernels),
            Work(
                gemms=gradients,
                attention_flops=attention_flops * 5 // 2,
                bytes=2 * moved,
                kernels=2 * kernels,
            ),
        )


def attention(sizes: TensorSizes, precision: Precision) -> UnitWork:
    """Norm (2 r), projections, rotation (4 T n d b), fused attention, residual (3 r)."""
    s = sizes
    inner, shared = s.heads * s.head_dim, s.kv_heads * s.head_dim
    gemms = (
        Gemm(s.tokens, inner + 2 * shared, s.hidden, precision=precision),
        Gemm(s.tokens, s.hidden, inner, precision=precision),
    )
    scores = 2 * s.tokens * (s.row_tokens + 1) * inner
    moved = (5 * s.residual + 2 * s.queries + 2 * s.keys) * s.bytes
    return UnitWork.of(gemms, moved, 10, scores)


def feed_forward(sizes: TensorSizes, width: int, precision: Precision) -> UnitWork:
    """Norm (2 r), two products, gate ((m + 1) T F b), residual (3 r)."""
    s = sizes
    gemms = (
        Gemm(s.tokens, s.gate_blocks * width, s.hidden, precision=precision),
        Gemm(s.tokens, s.hidden, width, precision=precision),
    )
    moved = (5 * s.residual + (s.gate_blocks + 1) * s.tokens * width) * s.bytes
    return UnitWork.of(gemms, moved, 6)


def experts(sizes: TensorSizes, precision: Precision) -> UnitWork:
    """Router, copies into and out of rows (2 R H b each), experts over all of their rows."""
    s = sizes
    rows, local = s.rows_of_one_expert, s.local_experts
    gemms = (
        Gemm(s.shard_tokens, s.experts * (2 if s.sees_context else 1), s.hidden, precision="fp32"),
        Gemm(rows, s.gate_blocks * s.expert, s.hidden, local, precision),
        Gemm(rows, s.hidden, s.expert, local, precision),
    )
    moved = 5 * s.residual + 4 * s.buffer_rows * s.hidden
    moved += (s.gate_blocks + 1) * s.expert_rows * s.expert
    # With several sources, the rows of an expert are brought together, and apart again.
    moved += 4 * s.expert_rows * s.hidden * (s.ep > 1 or s.gathers_rows)
    return UnitWork.of(gemms, moved * s.bytes, 40)


def embedding(sizes: TensorSizes) -> UnitWork:
    """A look-up; its gradient is written for the whole matrix."""
    look_up = Work(bytes=2 * sizes.whole * sizes.bytes, kernels=4)
    matrix = sizes.vocab * sizes.hidden * sizes.bytes
    return UnitWork(look_up, Work(bytes=2 * sizes.whole * sizes.bytes + 2 * matrix, kernels=4))


def head(sizes: TensorSizes) -> UnitWork:
    """Final norm, the product with fp32 results, and passes over the logits for the loss.

    In chunks of C tokens: all but the last one are computed again in the backward pass.
    """
    s, precision = sizes, _logits_precision(sizes)
    gemm = Gemm(s.logits_rows, s.vocab, s.hidden, precision=precision)
    count, logits = s.logits_chunks, s.tokens * s.vocab
    # Forward: maximum, difference, exponential, sum. Backward: one scaling, and a rounded copy.
    forward = Work(gemms=(gemm,) * count, bytes=6 * 4 * logits, kernels=8 * count)
    backward = Work(
        gemms=gemm.gradients * count + (gemm,) * (count - 1),
        bytes=4 * 4 * logits,
        kernels=10 * count,
    )
    return UnitWork(forward, backward)


def _logits_precision(sizes: TensorSizes) -> Precision:
    return "bf16" if sizes.bytes < 4 else "fp32"
