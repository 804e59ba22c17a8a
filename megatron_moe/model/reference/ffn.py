"""Feed-forward layers of the reference model: dense, shared expert, and the MoE layer.

    dense, shared:   FFN(x) = inner(x W_gate, x W_up) W_down
    MoE layer:       MoE(x)_t = sum over kept choices (e, p) of token t of  p * FFN_e(x_t)

`routing.py` decides which choices are kept. Sources: Xue et al., OpenMoE (arXiv 2402.01739), and
its released training code; `docs/model.md` lists where the two differ.

Shapes: B batch rows, S sequence, T = B S tokens row by row, H hidden, F feed-forward width,
E experts, K choices per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.logical import expert_width
from megatron_moe.model.reference.routing import (
    Routing,
    full_precision,
    hashed_experts,
    in_pools,
    route,
)


def gated(gate: Tensor, up: Tensor, model: ModelConfig) -> Tensor:
    """The gated activation of a feed-forward layer: [.., F] from the gate and up projections.

    `swiglu` (paper): silu(gate) * up. `gated-swiglu` (released): the gate projection has 2F
    outputs [a | b], and the result is a * silu(b) * up.
    """
    if model.ffn_variant == "swiglu":
        return F.silu(gate) * up
    a, b = gate.chunk(2, dim=-1)
    return a * F.silu(b) * up


class FeedForward(nn.Module):
    """A feed-forward layer of width F: the dense layer, or the shared expert."""

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
    """The E routed experts of a layer, each a feed-forward layer; weights are [E, in, out]."""

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.model = model
        experts, hidden, width = moe.num_experts, model.hidden_size, expert_width(model, moe)
        self.gate = nn.Parameter(torch.empty(experts, hidden, model.gate_blocks * width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Sum over a token's kept choices of probability times expert output, [T, H]."""
        # The sum has the dtype of the probabilities (fp32): in bf16 it would be rounded once per
        # choice instead of once.
        y_TH = torch.zeros(x_TH.shape, dtype=probs_TK.dtype, device=x_TH.device)
        # With gradients every expert runs, if need be on no rows: its gradients are then zeros, as
        # in the parallel model, rather than None. Without, unused experts are skipped.
        experts = range(self.gate.shape[0])
        for expert in experts if torch.is_grad_enabled() else ids_TK[kept_TK].unique().tolist():
            token, choice = (kept_TK & (ids_TK == expert)).nonzero(as_tuple=True)
            x = x_TH[token]
            inner = gated(x @ self.gate[expert], x @ self.up[expert], self.model)
            y_TH.index_add_(0, token, inner @ self.down[expert] * probs_TK[token, choice, None])
        return y_TH.to(x_TH.dtype)


class MoE(nn.Module):
    """Router, capacity and routed experts. The shared expert is part of the decoder block."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.moe = moe.of_layer(layer, model.num_layers)
        self.layer = layer
        self.forced_TK: Tensor | None = None
        """Experts that replace the router's choices; see `reference/replay.py`."""
        self.seed, self.step = 0, 0
        """Of a training step, for drop policies that draw; 0 in evaluation."""
        self.earlier: list[Tensor] = []
        """Loads of the step's earlier micro-batches; emptied at the start of a step."""
        moe = self.moe
        self.router = nn.Linear(model.hidden_size, moe.router_rows, bias=False)
        if moe.moe_router_type == "contextual":
            weight = nn.Parameter(torch.empty_like(self.router.weight))
            self.router.register_parameter("context_weight", weight)
        if moe.has_expert_bias:
            bias_E = nn.Parameter(torch.empty(moe.num_experts), requires_grad=False)
            self.router.register_parameter("expert_bias", bias_E)
        self.experts = Experts(model, moe)

    @property
    def bias_E(self) -> Tensor | None:
        """Added to scores for the choices, fp32 or more; `None` without."""
        bias_E: Tensor | None = getattr(self.router, "expert_bias", None)
        return bias_E

    def logits(
        self, x_BSH: Tensor, valid_BS: Tensor | None = None, context_BE: Tensor | None = None
    ) -> Tensor:
        """Router logits [B, S, E]: W x_t; with `--moe-router-type contextual` plus m_t; with `norm`
        sqrt(|A_e x_t|^2 + 1e-6), where W holds the factors A_e.

        m_t is the moving average of V x_j, j < t: m_(t+1) = a m_t + (1 - a) V x_t, m_0 = 0.

        Args:
            x_BSH: normalised residual stream.
            valid_BS: false for padding, which the average leaves out; `None` if there is none.
            context_BE: m of the first position, which becomes that of the position after the last
                one; `None`: rows begin here.
        """
        x_BSH = full_precision(x_BSH)
        own_BSE = F.linear(x_BSH, full_precision(self.router.weight))
        if self.moe.moe_router_type == "norm":
            factors_BSER = own_BSE.unflatten(-1, (self.moe.num_experts, -1))
            return (factors_BSER.square().sum(dim=-1) + 1e-6).sqrt()
        if self.moe.moe_router_type != "contextual":
            return own_BSE
        context_EH: Tensor = self.router.get_parameter("context_weight")
        new_BSE = F.linear(x_BSH, full_precision(context_EH))
        decay, seen = self.moe.moe_router_context_decay, []
        mean_BE = torch.zeros_like(new_BSE[:, 0]) if context_BE is None else context_BE.clone()
        for place in range(x_BSH.shape[1]):
            seen.append(mean_BE)
            after_BE = decay * mean_BE + (1 - decay) * new_BSE[:, place]
            if valid_BS is not None:
                after_BE = after_BE.where(valid_BS[:, place, None], mean_BE)
            mean_BE = after_BE
        if context_BE is not None:
            context_BE.copy_(mean_BE)
        return own_BSE + torch.stack(seen, dim=1)

    def forward(
        self,
        x_BSH: Tensor,
        training_capacity: bool,
        valid_BS: Tensor | None = None,
        context_BE: Tensor | None = None,
        tokens_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """[B, S, H] -> [B, S, H] and the routing decisions. A dropped choice contributes zero.

        Args:
            x_BSH: normalised residual stream.
            training_capacity: the capacity factor of training rather than evaluation.
            valid_BS: false for padding, which no expert processes and no loss counts; `None` if
                there is none.
            context_BE: see `logits`.
            tokens_BS: ids, which decide with `--moe-router-type token_hash`.
            documents_BS: number of each token's document; `None`: each row is one.
        """
        forced_TK = self.forced_TK
        if forced_TK is None and self.moe.moe_router_type == "token_hash":
            assert tokens_BS is not None
            forced_TK = hashed_experts(tokens_BS, self.moe)
        x_TH = x_BSH.flatten(0, 1)
        logits_BSE = self.logits(x_BSH, valid_BS, context_BE)
        if self.moe.moe_router_document_pool is not None and training_capacity:
            key = (self.seed, self.step, self.layer)
            logits_BSE = in_pools(logits_BSE, documents_BS, self.moe, key)
        logits_TE = logits_BSE.flatten(0, 1)
        rows = x_BSH.shape[0]
        routing = route(
            logits_TE,
            rows,
            self.moe,
            self.layer,
            training_capacity=training_capacity,
            forced_TK=forced_TK,
            seed=self.seed,
            step=self.step,
            bias_E=self.bias_E,
            earlier=self.earlier if training_capacity else (),
            valid_T=None if valid_BS is None else valid_BS.flatten(),
        )
        if training_capacity and "global_aux_loss" in self.moe.load_balancing_types:
            self.earlier.append(routing.preferred_E)
        y_TH = self.experts(x_TH, routing.ids_TK, routing.probs_TK, routing.kept_TK)
        return y_TH.view_as(x_BSH), routing
