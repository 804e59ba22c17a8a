"""The two losses of a router, and how they enter the backward pass.

Load balance: E * sum_e f_e P_e over a row (or the micro-batch), f_e the choices of expert e per
token, before drops, and P_e its mean probability: k when balanced (Switch Transformer, eq. 4, with
k choices). Router z-loss: mean of logsumexp(logits)^2 (ST-MoE, eq. 5).

The losses are not added to the model's loss: a layer inside a pipeline stage has no access to it.
They are attached to the combine weights by an autograd function that returns the weights as they
are, and whose backward pass adds the gradients of the losses.

With sequence parallelism each rank has a shard of every row. f comes from the gathered choices; the
loss is linear in P, so a rank's share of it is its own tokens' share, and shares add up.

Shapes: T tokens of this rank, E experts, B rows, K choices, A = K * (tokens of a row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.moe.plan import Plan
from megatron_moe.moe.router import Scores


class RouterLosses:
    """Both losses of one MoE layer.

    Args:
        moe: which balance loss, and the coefficients.
        num_moe_layers: MoE layers of the whole model, over which losses are averaged.
    """

    def __init__(self, moe: MoEConfig, num_moe_layers: int) -> None:
        self.num_experts = moe.num_experts
        self.load_balancing = moe.moe_router_load_balancing_type
        self.balance_weight = moe.moe_aux_loss_coeff / num_moe_layers
        self.z_weight = moe.moe_z_loss_coeff / num_moe_layers

    def attach(self, scores: Scores, plan: Plan) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Let the losses take part in the backward pass of what is made from the result.

        Args:
            scores: of this rank's tokens.
            plan: combine weights and choices of all tokens of the sequences.

        Returns:
            The combine weights of the plan, and this rank's shares of the balance and the z-loss,
            without coefficients and gradient, for the statistics.
        """
        rule = LossRule(
            tokens=plan.choices_TK.shape[0],
            per_row=self.load_balancing == "seq_aux_loss",
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
        )
        load_BE = self._load_per_row(plan)
        weights_TK, balance, z = attach_losses(plan.weights_TK, scores, load_BE, rule)
        return weights_TK, (balance, z)

    def _load_per_row(self, plan: Plan) -> Tensor:
        """Choices [B, E] that the balance loss is made of; zeros without one."""
        if self.load_balancing == "none":
            return plan.choices_TK.new_zeros(plan.batch, self.num_experts)
        if plan.capacity.groups == plan.batch:
            return plan.slots.load_GE  # Every row is a group: counted already.
        return load_per_row(plan.choices_TK, plan.batch, self.num_experts)


def load_per_row(choices_TK: Tensor, batch: int, num_experts: int) -> Tensor:
    """Choices per row and expert, [B, E] int64, of tokens in (sequence, batch) order."""
    tokens, topk = choices_TK.shape
    choices_BA = choices_TK.view(tokens // batch, batch, topk).transpose(0, 1).reshape(batch, -1)
    load_BE = choices_TK.new_zeros(batch, num_experts)
    return load_BE.scatter_add_(1, choices_BA, torch.ones_like(choices_BA))


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """How the two losses are computed and weighted.

    Args:
        tokens: tokens of the micro-batch over the ranks that share its rows.
        per_row: mean over rows of the balance loss of each, or one loss over the micro-batch.
        balance_weight: factor of the balance loss.
        z_weight: factor of the z-loss.
    """

    tokens: int
    per_row: bool
    balance_weight: float = 1.0
    z_weight: float = 1.0


def attach_losses(
    weights_TK: Tensor, scores: Scores, load_BE: Tensor, rule: LossRule
) -> tuple[Tensor, Tensor, Tensor]:
    """`RouterLosses.attach` as a function.

    Args:
        weights_TK: combine weights, of this rank's tokens or of more.
        scores: of this rank's tokens.
        load_BE: int64 choices over all ranks that share the rows; zeros: no balance loss.
        rule: formula and weights.

    Returns:
        The combine weights, and this rank's shares of the balance and the z-loss.
    """
    return _AttachLosses.apply(weights_TK, scores.probs_TE, scores.log_z_T, load_BE, rule)


class _AttachLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor,
        probs_TE: Tensor,
        log_z_T: Tensor,
        load_BE: Tensor,
        rule: LossRule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, experts = load_BE.shape
        # With mass_e the summed probability of expert e: the mean over B rows of
        # E * sum_e (load_e / S) (mass_e / S), S = tokens / B, is the dot product of the tables of
        # load and mass times E * B / tokens^2. Over the micro-batch as one row, each row has the
        # total load as its slope and the factor is E / tokens^2.
        slope_BE = load_BE if rule.per_row else load_BE.sum(0, keepdim=True).expand(rows, -1)
        slope_BE = slope_BE.to(probs_TE.dtype)
        mass_BE = probs_TE.view(-1, rows, experts).sum(0)
        factor = experts * (rows if rule.per_row else 1) / rule.tokens**2
        balance = torch.vdot(mass_BE.reshape(-1), slope_BE.reshape(-1)) * factor
        z = torch.vdot(log_z_T, log_z_T) / rule.tokens
        ctx.save_for_backward(log_z_T, slope_BE)
        ctx.tokens = probs_TE.shape[0]
        ctx.weights = rule.balance_weight * factor, 2 * rule.z_weight / rule.tokens
        ctx.mark_non_differentiable(balance, z)
        ctx.set_materialize_grads(False)
        return weights_TK, balance, z

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        log_z_T, slope_BE = ctx.saved_tensors
        rows, experts = slope_BE.shape
        scale = _main_loss_scale()
        slope_BE, log_z_T = (
            x * (weight * scale if scale is not None else weight)
            for x, weight in zip((slope_BE, log_z_T), ctx.weights, strict=True)
        )
        probs_TE = slope_BE.expand(ctx.tokens // rows, rows, experts).reshape(-1, experts)
        return grads[0], probs_TE, log_z_T, None, None


def _main_loss_scale() -> Tensor | None:
    """The factor on attached losses. Before each backward pass, Megatron-Core's schedule sets it to
    the scale of the main loss of a micro-batch; `None` outside a schedule means 1.
    """
    # Imported here: Megatron-Core takes seconds to import and a forward pass does not need it.
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    return MoEAuxLossAutoScaler.main_loss_backward_scale
