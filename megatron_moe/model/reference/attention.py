"""The attention of the reference model: rotary positions, causal, by document, or with a cache.

Plain PyTorch, written to be read (see `megatron_moe.model.reference.model`). Sources: Xue et al.,
OpenMoE (arXiv 2402.01739), and its released training code; `docs/model.md` says where the two
differ.

Shapes: B batch, S sequence, H hidden, N heads, D head width, U tokens that can be attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.logical import softmax_scale
from megatron_moe.model.reference.cache import LayerMemory
from megatron_moe.model.reference.routing import full_precision


def rotate(x_BNSD: Tensor, base: float, positions_BS: Tensor | None = None) -> Tensor:
    """Rotary position embedding, half-split: channel i is paired with channel i + D/2.

    Position p turns pair i by the angle p * base^(-2i/D). Angles, sine and cosine are fp32.
    Without positions they count from the start of the row.
    """
    x = full_precision(x_BNSD)
    length, width = x.shape[-2:]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width
    positions = torch.arange(length, device=x.device, dtype=x.dtype)
    if positions_BS is not None:
        positions = positions_BS[:, None].to(x.dtype)
    angles = positions[..., None] * (1.0 / base**exponents)  # [S, D/2] or [B, 1, S, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BNSD.dtype)


class Attention(nn.Module):
    """Causal attention with RoPE on queries and keys; heads are head-major in the N*D rows."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        inner = model.num_attention_heads * model.kv_channels
        self.query = nn.Linear(model.hidden_size, inner, bias=False)
        self.key = nn.Linear(model.hidden_size, inner, bias=False)
        self.value = nn.Linear(model.hidden_size, inner, bias=False)
        self.output = nn.Linear(inner, model.hidden_size, bias=False)

    def forward(
        self,
        x_BSH: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        memory: LayerMemory | None = None,
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; with a memory, of the tokens that follow those in it."""
        heads, base = (self.model.num_attention_heads, -1), self.model.rotary_base
        query = self.query(x_BSH).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x_BSH).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x_BSH).unflatten(-1, heads).transpose(1, 2)
        query, key = rotate(query, base, positions_BS), rotate(key, base, positions_BS)
        if memory is not None:
            y_BNSD = self._attend(query, *memory.extend(key, value))
        elif documents_BS is None:
            y_BNSD = self._attend(query, key, value)
        else:
            y_BNSD = torch.cat(
                [
                    self._by_document(query[b], key[b], value[b], ids)
                    for b, ids in enumerate(documents_BS)
                ]
            )
        return self.output(y_BNSD.transpose(1, 2).flatten(2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, seen_B1SU: Tensor | None = None
    ) -> Tensor:
        """Every query [B, N, S, D] attends to what it sees of the keys and values [B, N, U, D].

        Without a mask S = U, and every position sees those up to itself.
        """
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen_B1SU,
            is_causal=seen_B1SU is None,
            scale=softmax_scale(self.model),
            dropout_p=self.model.attention_dropout if self.training else 0.0,
        )

    def _by_document(self, query: Tensor, key: Tensor, value: Tensor, ids_S: Tensor) -> Tensor:
        """[N, S, D] each: a row, document by document as if each were alone; [1, N, S, D]."""
        lengths = torch.unique_consecutive(ids_S, return_counts=True)[1].tolist()
        parts = [tensor[None].split(lengths, dim=2) for tensor in (query, key, value)]
        return torch.cat([self._attend(*part) for part in zip(*parts, strict=True)], dim=2)
