"""Rotary position embedding and core attention, in the shapes that Megatron-Core hands over.

The engine's PyTorch core attention materialises S x S scores; this one is PyTorch's fused
`scaled_dot_product_attention`. Rotation happens here, not in the engine, because the engine rounds
sine and cosine to the activations' type and OpenMoE keeps them in fp32.

Shapes: S tokens of a row, B rows, N heads of this rank, D head dimension.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


def rotary_table(
    length: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, D/2] of position times base^(-2i/D), computed in ``dtype``.

    Source: Su et al., RoFormer (arXiv 2104.09864), eq. 15, half-split as in GPT-NeoX.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    position = torch.arange(length, dtype=dtype, device=device)
    angle = torch.outer(position, base**-exponent)
    return angle.cos(), angle.sin()


def _turn(x_SBND: Tensor, cos_SD: Tensor, sin_SD: Tensor, sign: int) -> Tensor:
    """Each pair (x_i, x_{i+D/2}) turned by ``sign`` times its angle, in three passes."""
    cos, sin = torch.cat((cos_SD, cos_SD), -1)[:, None, None, :], sin_SD[:, None, None, :]
    x = x_SBND.to(cos_SD.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = x * cos
    new_first, new_second = turned.chunk(2, dim=-1)
    new_first.addcmul_(second, sin, value=-sign)
    new_second.addcmul_(first, sin, value=sign)
    return turned.to(x_SBND.dtype)


class _Rotation(torch.autograd.Function):
    """Keeps nothing of ``x``: the gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn(x_SBND, cos_SD, sin_SD, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_SD, sin_SD = ctx.saved_tensors
        return _turn(grads[0], cos_SD, sin_SD, -1), None, None


def rotate(x_SBND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) by its angle, in fp32; the result has the type of ``x``."""
    return _Rotation.apply(x_SBND, cos_SD, sin_SD)


class RotaryCoreAttention(torch.nn.Module):
    """softmax(scale * rot(q) rot(k)^T + causal mask) v for the heads of one tensor-parallel rank.

    The constructor takes what `SelfAttention` passes; parts that OpenMoE does not use are refused
    in `forward` rather than ignored.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        if config.kv_channels is None:
            raise ValueError("the engine's configuration has no kv_channels")
        self.sequence_parallel = config.sequence_parallel
        self.dropout = config.attention_dropout
        self.head_dim = config.kv_channels
        self.rotary_base = config.rotary_base  # type: ignore[attr-defined]
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(self.head_dim)
        self._table: tuple[tuple[int, torch.device, torch.dtype], Tensor, Tensor] | None = None

    def _angles(self, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # fp64 activations (gradient checks) keep their precision; bf16 ones rotate in fp32.
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (length, x.device, dtype)
        if self._table is None or self._table[0] != key:
            table = rotary_table(length, self.head_dim, self.rotary_base, x.device, dtype)
            self._table = (key, *table)
        return self._table[1], self._table[2]

    def _dropout_rng(self) -> AbstractContextManager[None]:
        """Each tensor-parallel rank has heads of its own, so it draws from its own stream."""
        if self.dropout == 0.0 or not self.training or self.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, D].
            key: likewise.
            value: likewise.
            attention_mask: must be ``None``: the mask is causal.
            attn_mask_type: the engine's word for that; not needed.
            attention_bias: must be ``None``.
            packed_seq_params: must be ``None``.

        Returns:
            [S, B, N * D].
        """
        if (
            attention_mask is not None
            or attention_bias is not None
            or packed_seq_params is not None
        ):
            raise ValueError("OpenMoE attention is causal: no mask, bias or packed sequences")
        length, batch, heads, dim = query.shape
        cos, sin = self._angles(length, query)
        q, k = rotate(query, cos, sin), rotate(key, cos, sin)
        with self._dropout_rng():
            out = F.scaled_dot_product_attention(
                q.permute(1, 2, 0, 3),
                k.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                scale=self.scale,
            )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * dim)
