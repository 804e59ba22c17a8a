"""Rotary position embedding and core attention, in the shapes that Megatron-Core hands over.

Megatron-Core's PyTorch core attention materialises S x S scores; this one is PyTorch's fused
`scaled_dot_product_attention`. Rotation happens here too, because Megatron-Core rounds sine and
cosine to the activations' dtype and OpenMoE keeps them in fp32.

Rows of several documents may have positions and a mask of their own (`Documents`). They pass
through Megatron-Core as `packed_seq_params`, which reaches every layer and its recomputation
unchanged.

Shapes: S tokens of a row, B rows, N heads of this rank, G key and value heads of this rank (N
without grouped-query attention), D head dimension.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from fused_kernels.autograd import rotary
from fused_kernels.operations import Rotary
from fused_kernels.reference import rotary as reference


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


@dataclass(frozen=True)
class Documents:
    """Positions, documents and padding of a micro-batch, for all its layers."""

    positions_BS: Tensor | None
    """Positions of the rotary embedding; `None` counts from the start of the row."""
    documents_BS: Tensor | None
    """Document of each token: attention stays within it; `None` is one document per row."""
    padding_BS: Tensor | None = None
    """Not 0 at padding; `None`: no token is, or it does not matter."""
    zeroes_padding: bool = True
    """Whether padding is zero at the input of every layer, or only counted apart."""
    tokens_BS: Tensor | None = None
    """Ids of the tokens, for a router that needs them; else `None`."""
    qkv_format: str = "sbhd"
    """Required by Megatron-Core in `packed_seq_params`: tensors keep their usual shape."""
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, S, S], added to scores: 0 where a position attends, else -inf.

        Computed once and shared by all layers and heads: B S^2 numbers in the dtype of the
        activations, for as long as the micro-batch is in progress.
        """
        if self.documents_BS is None:
            return None
        if dtype not in self._bias:
            ids_BS = self.documents_BS
            sees_BSS = (ids_BS[:, :, None] == ids_BS[:, None, :]).tril_()
            zero = torch.zeros((), dtype=dtype, device=ids_BS.device)
            self._bias[dtype] = torch.where(sees_BSS, zero, -torch.inf)[:, None]
        return self._bias[dtype]

    def without_padding(self, x_SBH: Tensor, tp_group: ProcessGroup) -> Tensor:
        """``x_SBH`` with zeros at padding.

        Args:
            x_SBH: activations; of S this rank's shard under sequence parallelism.
            tp_group: ranks that share the sequence.
        """
        padding_SB = self.padding_of(x_SBH, tp_group) if self.zeroes_padding else None
        return x_SBH if padding_SB is None else x_SBH.masked_fill(padding_SB.unsqueeze(-1), 0.0)

    def padding_of(self, x_SBH: Tensor, tp_group: ProcessGroup) -> Tensor | None:
        """[S, B] bool, which of these activations are padding; arguments as `without_padding`."""
        padding_SB = _local(self.padding_BS, x_SBH, tp_group)
        return None if padding_SB is None else padding_SB != 0

    def tokens_of(self, x_SBH: Tensor, tp_group: ProcessGroup) -> Tensor | None:
        """[S, B], ids of these activations, if layers get them; arguments as `without_padding`."""
        return _local(self.tokens_BS, x_SBH, tp_group)

    def numbers_of(self, x_SBH: Tensor, tp_group: ProcessGroup) -> Tensor | None:
        """[S, B], documents of these activations, if rows have several; arguments as before."""
        return _local(self.documents_BS, x_SBH, tp_group)


def _local(plane_BS: Tensor | None, x_SBH: Tensor, tp_group: ProcessGroup) -> Tensor | None:
    """The part of a plane that belongs to these activations, [S, B]."""
    if plane_BS is None:
        return None
    local = x_SBH.shape[0]
    # All of the sequence, or one of as many shards as there are ranks.
    first = tp_group.rank() * local if local < plane_BS.shape[1] else 0
    return plane_BS.t().narrow(0, first, local)


def documents_of(
    positions_BS: Tensor | None,
    documents_BS: Tensor | None,
    padding_BS: Tensor | None = None,
    zeroes_padding: bool = True,
    tokens_BS: Tensor | None = None,
) -> Documents | None:
    """The value for the layers; `None` without any: the plain causal path, without a mask."""
    if all(plane is None for plane in (positions_BS, documents_BS, padding_BS, tokens_BS)):
        return None
    return Documents(positions_BS, documents_BS, padding_BS, zeroes_padding, tokens_BS)


class RotaryCoreAttention(torch.nn.Module):
    """softmax(scale * rot(q) rot(k)^T + causal mask) v for the heads of one tensor-parallel rank.

    The constructor takes what `SelfAttention` passes; `forward` rejects what OpenMoE does not use
    rather than ignoring it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        kernel: Rotary = reference,
        **_: Any,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        if config.kv_channels is None:
            raise ValueError("Megatron-Core's configuration has no kv_channels")
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
        """Each tensor-parallel rank has its own heads, so it draws from its own stream."""
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
        packed_seq_params: Documents | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, D].
            key: [S, B, G, D].
            value: likewise.
            attention_mask: must be ``None``: the mask is causal, within documents if there are any.
            attn_mask_type: the same as an enum; not needed.
            attention_bias: must be ``None``.
            packed_seq_params: the `Documents`, or ``None``.

        Returns:
            [S, B, N * D].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("OpenMoE attention is causal: no mask or bias")
        length, batch, heads, dim = query.shape
        cos, sin = self._angles(length, query)
        bias = None
        if packed_seq_params is not None:
            bias, positions_BS = packed_seq_params.bias(query.dtype), packed_seq_params.positions_BS
            if positions_BS is not None:
                cos, sin = cos[positions_BS.t()], sin[positions_BS.t()]
        q, k = (rotary(x, cos, sin, self.kernel) for x in (query, key))
        if key.shape[2] != heads:
            # Repeated, rather than `enable_gqa`: with that, fp32 and masks have no fused kernel on
            # GPUs. On a CPU both take the same time (8 and 32 heads, 64 to 1024 tokens).
            repeats = heads // key.shape[2]
            k, value = (t.repeat_interleave(repeats, dim=2) for t in (k, value))
        # Attention keeps the values for its backward pass. As a view they would keep the whole
        # projection alive, with queries and keys that are kept rotated already.
        value = value.contiguous()
        with self._dropout_rng():
            out = F.scaled_dot_product_attention(
                q.permute(1, 2, 0, 3),
                k.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=bias,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=bias is None,
                scale=self.scale,
            )
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * dim)
