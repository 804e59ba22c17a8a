"""The feed-forward layers of the reference model: dense, shared expert, routed experts.

Plain PyTorch, written to be read (see `megatron_moe.model.reference.model`). Sources: Xue et al.,
OpenMoE (arXiv 2402.01739), and its released training code; `docs/model.md` says where the two
differ.

Shapes: B batch, S sequence, T tokens row by row, H hidden, F feed-forward width, E experts, K
choices per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.logical import expert_width


def gated(gate: Tensor, up: Tensor, model: ModelConfig) -> Tensor:
    """The inside of a feed-forward layer: [.., F] from the gate and up projections.

    `swiglu`: silu(gate) * up (paper). `gated-swiglu`, gate = [a|b]: a * silu(b) * up (released).
    """
    if model.ffn_variant == "swiglu":
        return F.silu(gate) * up
    a, b = gate.chunk(2, dim=-1)
    return a * F.silu(b) * up


class FeedForward(nn.Module):
    """A dense feed-forward layer of width F, also the shared expert."""

    def __init__(self, model: ModelConfig, width: int) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Linear(model.hidden_size, model.gate_blocks * width, bias=False)
        self.up = nn.Linear(model.hidden_size, width, bias=False)
        self.down = nn.Linear(width, model.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down(gated(self.gate(x_BSH), self.up(x_BSH), self.model))


class Experts(nn.Module):
    """The E routed experts of a layer, each a feed-forward layer, stored [E, in, out]."""

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.model = model
        experts, hidden, width = moe.num_experts, model.hidden_size, expert_width(model, moe)
        self.gate = nn.Parameter(torch.empty(experts, hidden, model.gate_blocks * width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Sum over a token's kept choices of probability times expert output, [T, H]."""
        y_TH = torch.zeros(x_TH.shape, dtype=probs_TK.dtype, device=x_TH.device)
        # Experts without tokens run on no rows, so that their gradients are zeros, not None.
        chosen = range(self.gate.shape[0])
        for expert in chosen if torch.is_grad_enabled() else ids_TK[kept_TK].unique().tolist():
            token, choice = (kept_TK & (ids_TK == expert)).nonzero(as_tuple=True)
            x = x_TH[token]
            inner = gated(x @ self.gate[expert], x @ self.up[expert], self.model)
            y_TH.index_add_(0, token, inner @ self.down[expert] * probs_TK[token, choice, None])
        return y_TH.to(x_TH.dtype)
