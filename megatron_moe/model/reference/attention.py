"""Attention of the reference model: rotary positions; causal, per document, or with a KV cache.

    q, k, v = x W_q, x W_k, x W_v          read head-major as [B, N, S, D]; k and v as [B, G, S, D]
    q, k = norm(q), norm(k)                with --qk-layernorm
    y = softmax(s rot(q) rot(k)^T + causal mask) v,   output = concat(heads) W_o

The scale s is 1 in the released model, whose query initialisation contains the 1/sqrt(D). Sources:
Xue et al., OpenMoE (arXiv 2402.01739), and its released training code; `docs/model.md` lists where
the two differ. Grouped queries: Ainslie et al. (arXiv 2305.13245). Norms of queries and keys: over
a head as in Megatron-LM, or over all heads as in OLMoE (arXiv 2409.02060).

Shapes: B batch rows, S sequence, H hidden, N heads, G heads of keys and values (N without
grouped-query attention), D head width, U tokens that can be attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.logical import softmax_scale
from megatron_moe.model.reference.cache import LayerCache
from megatron_moe.model.reference.norm import RMSNorm
from megatron_moe.model.reference.routing import full_precision


def rotate(x_BNSD: Tensor, base: float, positions_BS: Tensor | None = None) -> Tensor:
    """Rotary position embedding, half-split: channel i is paired with channel i + D/2.

    The pair (x_i, x_{i + D/2}) at position p is rotated by the angle p * base^(-2i/D). Without
    `positions_BS`, positions count from 0 at the start of the row.
    """
    # bf16 represents integers exactly only up to 256: angles computed in it would be off by whole
    # radians at later positions, so angles, sine, cosine and the rotation are fp32.
    x = full_precision(x_BNSD)
    length, width = x.shape[-2:]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width
    positions = torch.arange(length, device=x.device, dtype=x.dtype)
    if positions_BS is not None:
        positions = positions_BS[:, None].to(x.dtype)
    angles = positions[..., None] * (1.0 / base**exponents)  # [S, D/2] or [B, 1, S, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BNSD.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with RoPE on queries and keys.

    The outputs of each projection are head-major: head n is rows [n D, (n + 1) D) of its weight.
    N * D need not equal H (8B: 24 * 128 = 3072 with H = 2048). Query head n uses key head
    n // (N / G): with N = 4 and G = 2, heads 0 and 1 share key head 0, heads 2 and 3 key head 1.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        inner = model.num_attention_heads * model.kv_channels
        self.query = nn.Linear(model.hidden_size, inner, bias=False)
        shared = model.key_value_heads * model.kv_channels
        self.key = nn.Linear(model.hidden_size, shared, bias=False)
        self.value = nn.Linear(model.hidden_size, shared, bias=False)
        self.output = nn.Linear(inner, model.hidden_size, bias=False)
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if model.qk_layernorm:
            whole = model.qk_layernorm_scope == "projection"
            self.query_norm = RMSNorm(model, inner if whole else model.kv_channels)
            self.key_norm = RMSNorm(model, shared if whole else model.kv_channels)

    def forward(
        self,
        x_BSH: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; with a cache, for tokens that follow the cached ones.

        Args:
            x_BSH: normalised residual stream.
            positions_BS: rotary positions; `None` counts from the start of each row.
            documents_BS: attention is restricted to equal numbers; `None` means the whole row.
            cache: this layer's keys and values of earlier tokens.
        """
        base = self.model.rotary_base
        query = self._heads(self.query(x_BSH), self.query_norm)
        key = self._heads(self.key(x_BSH), self.key_norm)
        value = self._heads(self.value(x_BSH), None)
        query, key = rotate(query, base, positions_BS), rotate(key, base, positions_BS)
        if cache is not None:
            y_BNSD = self._attend(query, *cache.extend(key, value))
        elif documents_BS is None:
            y_BNSD = self._attend(query, key, value)
        else:
            y_BNSD = torch.cat(
                [
                    self._attend_by_document(query[b], key[b], value[b], ids)
                    for b, ids in enumerate(documents_BS)
                ]
            )
        return self.output(y_BNSD.transpose(1, 2).flatten(2))

    def _heads(self, x_BSI: Tensor, norm: RMSNorm | None) -> Tensor:
        """The outputs of a projection as heads, [B, S, I] -> [B, I / D, S, D], normalised."""
        width = self.model.kv_channels
        if norm is not None:
            whole = self.model.qk_layernorm_scope == "projection"
            x_BSI = norm(x_BSI) if whole else norm(x_BSI.unflatten(-1, (-1, width))).flatten(-2)
        return x_BSI.unflatten(-1, (-1, width)).transpose(1, 2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask_B1SU: Tensor | None = None
    ) -> Tensor:
        """Attention of queries [B, N, S, D] to keys and values [B, G, U, D].

        Without a mask S = U and attention is causal.
        """
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_B1SU,
            is_causal=mask_B1SU is None,
            scale=softmax_scale(self.model),
            dropout_p=self.model.attention_dropout if self.training else 0.0,
            enable_gqa=key.shape[1] != query.shape[1],
        )

    def _attend_by_document(
        self, query: Tensor, key: Tensor, value: Tensor, ids_S: Tensor
    ) -> Tensor:
        """Attention within each document of one row: queries [N, S, D] -> [1, N, S, D].

        Documents are contiguous, so a row is split at document boundaries and each piece is
        attended to on its own. This is the definition; a mask would be an implementation of it.
        """
        lengths = torch.unique_consecutive(ids_S, return_counts=True)[1].tolist()
        pieces = [tensor[None].split(lengths, dim=2) for tensor in (query, key, value)]
        return torch.cat([self._attend(*piece) for piece in zip(*pieces, strict=True)], dim=2)
