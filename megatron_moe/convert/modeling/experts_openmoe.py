"""Feed-forward layers of OpenMoE: dense, shared, and routed experts with the losses of the router.

    FFN(x) = inner(x W_gate, x W_up) W_down
    MoE(x)_t = sum over the kept choices (e, p) of token t of  p * FFN_e(x_t),  p = softmax(x W_r)

The part of `modeling_openmoe.py`, beside this file, that makes OpenMoE sparse.

Shapes: B rows, S tokens of a row, T = B S tokens row by row, H hidden, F feed-forward width,
E experts, K choices of a token, G capacity groups, A choices of a group, R rows over which the
balance loss is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_openmoe import OpenMoeConfig


def full_precision(x: Tensor) -> Tensor:
    """fp32, or fp64 if it already is: the precision of norms, angles, router and logits."""
    return x if x.dtype == torch.float64 else x.float()


class OpenMoeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, times a learned scale."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> [.., width]."""
        y = full_precision(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return y.to(x.dtype) * self.weight


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The gated activation, [.., F]; with `swiglu` the gate is [a | b] of width 2F."""
    if act == "silu":
        return F.silu(gate) * up
    a, b = gate.chunk(2, dim=-1)
    return a * F.silu(b) * up


class OpenMoeMLP(nn.Module):
    """A feed-forward layer: the dense layer, the shared expert, or an expert on its own."""

    def __init__(self, config: OpenMoeConfig, width: int) -> None:
        super().__init__()
        self.act = config.hidden_act
        hidden, blocks = config.hidden_size, 2 if self.act == "swiglu" else 1
        self.gate_proj = nn.Linear(hidden, blocks * width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act))


class OpenMoeExperts(nn.Module):
    """Experts as three tensors [E, in, out]: the layout `stacked`."""

    def __init__(self, config: OpenMoeConfig, width: int) -> None:
        super().__init__()
        self.act = config.hidden_act
        experts, hidden, blocks = config.num_experts, config.hidden_size, 1 + (self.act != "silu")
        self.wi_gate = nn.Parameter(torch.empty(experts, hidden, blocks * width))
        self.wi_up = nn.Parameter(torch.empty(experts, hidden, width))
        self.wo = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Sum of the outputs of each token's experts, weighted, [T, H]."""

        def run(expert: int, x: Tensor) -> Tensor:
            inner = gated(x @ self.wi_gate[expert], x @ self.wi_up[expert], self.act)
            return inner @ self.wo[expert]

        return combine(run, len(self.wo), x_TH, ids_TK, weights_TK, kept_TK)


class OpenMoeExpertList(nn.ModuleList):
    """Experts as modules: the layout `unstacked`."""

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """As `OpenMoeExperts`."""
        run = lambda expert, x: self[expert](x)  # noqa: E731
        return combine(run, len(self), x_TH, ids_TK, weights_TK, kept_TK)


def combine(
    run: Callable[[int, Tensor], Tensor],
    experts: int,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
) -> Tensor:
    """Sum over the kept choices of each token of weight times expert output, [T, H], in fp32."""
    y_TH = torch.zeros(x_TH.shape, dtype=weights_TK.dtype, device=x_TH.device)
    # With gradients every expert runs, so that each has a gradient in every backward pass.
    used = range(experts) if torch.is_grad_enabled() else ids_TK[kept_TK].unique().tolist()
    for expert in used:
        token, choice = (kept_TK & (ids_TK == expert)).nonzero(as_tuple=True)
        y_TH.index_add_(0, token, run(expert, x_TH[token]) * weights_TK[token, choice, None])
    return y_TH.to(x_TH.dtype)


class OpenMoeRouter(nn.Linear):
    """The router of the layout `unstacked`, [E, H]."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., E], in fp32."""
        return F.linear(full_precision(x), full_precision(self.weight))


class OpenMoeSparseMLP(nn.Module):
    """Router and experts: the K most probable experts, weighted by their probabilities."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.moe_intermediate_size or config.intermediate_size
        experts, hidden = config.num_experts, config.hidden_size
        self.experts: nn.Module
        if config.expert_layout == "stacked":
            self.gate_weight = nn.Parameter(torch.empty(experts, hidden))
            self.experts = OpenMoeExperts(config, width)
        else:
            self.gate = OpenMoeRouter(hidden, experts, bias=False)
            self.experts = OpenMoeExpertList(OpenMoeMLP(config, width) for _ in range(experts))

    def forward(self, x_BSH: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, S, H] -> [B, S, H], and router logits [T, E]; ``valid_BS`` is false for padding."""
        x_TH = x_BSH.flatten(0, 1)
        if self.config.expert_layout == "stacked":
            logits_TE = F.linear(full_precision(x_TH), full_precision(self.gate_weight))
        else:
            logits_TE = self.gate(x_TH)
        probs_TK, ids_TK = choices(logits_TE.softmax(dim=-1), self.config.router_topk)
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if valid_BS is not None:
            kept_TK &= valid_BS.flatten()[:, None]
        if self.config.moe_capacity != "dropless":
            kept_TK = within_capacity(self.config, ids_TK, probs_TK, *x_BSH.shape[:2])
        y_TH = self.experts(x_TH, ids_TK, probs_TK, kept_TK)
        return y_TH.view_as(x_BSH), logits_TE


def choices(probs_TE: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each token and their experts, [T, K]; ties by expert."""
    values, ids = probs_TE.sort(dim=-1, descending=True, stable=True)
    return values[:, :number], ids[:, :number]


def capacity_group(config: OpenMoeConfig, rows: int, length: int) -> int:
    """Tokens that compete for the slots of an expert.

    Raises:
        ValueError: the configured group neither divides a row nor consists of whole rows.
    """
    size = config.run_setting("moe_capacity_group_size", None)
    if size is None:
        per_row = config.run_setting("moe_capacity_rule", "t5x") == "t5x"
        return length if per_row else rows * length
    if (length % size and size % length) or (rows * length) % size:
        raise ValueError(
            f"the row must be a multiple of moe_capacity_group_size {size}, or the group whole "
            f"rows (got {rows} rows of {length}); set moe_capacity to 'dropless'"
        )
    return int(size)


def within_capacity(
    config: OpenMoeConfig, ids_TK: Tensor, probs_TK: Tensor, rows: int, length: int
) -> Tensor:
    """Which choices find one of the slots of their expert, [T, K].

    The choices of a group queue for their experts: all first choices in token order, then all
    second ones, or by probability (policy `probs`). Each expert takes as many as it has slots.
    """
    phase = "eval" if config.moe_capacity == "eval" else "expert"
    published = getattr(config, f"router_capacity_factor_{config.moe_capacity}")
    factor = config.run_setting(f"moe_{phase}_capacity_factor", published)
    if factor is None:
        return torch.ones_like(ids_TK, dtype=torch.bool)
    group, topk = capacity_group(config, rows, length), ids_TK.shape[1]
    rule = config.run_setting("moe_capacity_rule", "t5x")
    least = config.run_setting("moe_min_capacity", config.router_min_capacity)
    if rule == "t5x":
        slots = round(factor * group / config.num_experts)
    elif rule == "port":
        slots = math.floor(topk * factor * group / config.num_experts)
        slots += slots % 2
    else:  # Megatron-Core's; the order of its operations decides the last bit, and so the ceil
        slots, least = math.ceil((topk * group / config.num_experts) * factor), 0
    ids_GA = ids_TK.unflatten(0, (-1, group)).transpose(1, 2).flatten(1)
    order_GA = torch.arange(topk * group, device=ids_TK.device).expand_as(ids_GA)
    if config.run_setting("moe_token_drop_policy", "position") == "probs":
        probs_GA = probs_TK.unflatten(0, (-1, group)).transpose(1, 2).flatten(1)
        order_GA = probs_GA.argsort(dim=1, descending=True, stable=True)
    queue_GA = ids_GA.gather(1, order_GA)
    ahead_GA = F.one_hot(queue_GA, config.num_experts).cumsum(1).gather(2, queue_GA[..., None])
    kept_GA = ahead_GA[..., 0] <= max(slots, least)
    kept_GA = torch.zeros_like(kept_GA).scatter(1, order_GA, kept_GA)
    return kept_GA.unflatten(1, (topk, group)).transpose(1, 2).flatten(0, 1)


def router_losses(
    config: OpenMoeConfig, logits: tuple[Tensor, ...], valid_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss of the router, means over MoE layers, without weights.

    The first is E sum_e f_e P_e, which is K when balanced: f_e choices of e per token, P_e its mean
    probability, over each row, over all rows, or, with the capacity of training, over each capacity
    group. Padding does not count.
    """
    over = config.run_setting("moe_router_load_balancing_type", "seq_aux_loss")
    rows = 1 if over == "aux_loss" else len(valid_BS)
    if over == "group_aux_loss" and config.moe_capacity == "train":
        rows = valid_BS.numel() // capacity_group(config, *valid_BS.shape)
    valid_RT1 = valid_BS.reshape(rows, -1, 1)
    tokens_R1 = valid_RT1.sum(dim=1).clamp(min=1)
    balance = z_loss = valid_BS.new_zeros((), dtype=torch.float32)
    for logits_TE in (each.to(valid_BS.device) for each in logits):  # layers on several devices
        probs_TE = logits_TE.softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE)
        chosen_TE.scatter_(1, choices(probs_TE, config.router_topk)[1], 1.0)
        f_RE, p_RE = (
            (x.unflatten(0, (rows, -1)) * valid_RT1).sum(dim=1) / tokens_R1
            for x in (chosen_TE, probs_TE)
        )
        if over != "none":
            balance = balance + config.num_experts * (f_RE * p_RE).sum(dim=1).mean()
        square_T = logits_TE.logsumexp(dim=-1).square()
        z_loss = z_loss + (square_T * valid_BS.flatten()).sum() / valid_BS.sum()
    layers = max(len(logits), 1)
    return balance / layers, z_loss / layers
