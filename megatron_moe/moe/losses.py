"""The losses of a router, and how they enter the backward pass.

Load balance: E * sum_e f_e P_e over a row, a capacity group or the micro-batch, f_e the choices of
expert e per token, before drops, and P_e its mean probability: k when balanced (Switch Transformer,
eq. 4, with k choices). With `global_aux_loss` f_e is of the global batch so far and P_e of the
micro-batch. Several of them can be added up. Router z-loss: mean of logsumexp(logits)^2 (ST-MoE,
eq. 5).

The losses are not added to the model's loss: a layer inside a pipeline stage has no access to it.
They are attached to the combine weights by an autograd function that returns the weights as they
are, and whose backward pass adds the gradients of the losses.

With sequence parallelism each rank has a shard of every row. f comes from the gathered choices; the
loss is linear in P, so a rank's share of it is its own tokens' share, and shares add up.

With `--moe-ignore-padding-tokens` all are of real tokens alone, in f, P and all denominators. A row
or group that is padding as a whole is none of those over which the mean is taken; where a
micro-batch is, its losses are 0.

Shapes: T tokens of this rank, E experts, B rows, G capacity groups, P parts that are balanced for
themselves, K choices, A = K * (tokens of a row), Q consecutive tokens with a slope each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_kernels.operations import RouterKernel
from fused_kernels.reference import router as reference
from megatron_moe.config import MoEConfig
from megatron_moe.moe.exchange import Group, all_gather, rank_of
from megatron_moe.moe.global_loads import GlobalLoads
from megatron_moe.moe.plan import Capacity, Plan, by_priority
from megatron_moe.moe.scoring import Scores


class RouterLosses:
    """The losses of one MoE layer.

    Args:
        moe: which balance losses, and the coefficients.
        num_moe_layers: MoE layers of the whole model.
        tp_group: ranks that share the rows; `None` for one.
        dp_group: ranks with other rows; `None` for one.

    Attributes:
        balance: kind and factor of each of this layer's balance losses, which are k when balanced.
        z_weight: factor of this layer's z-loss.
        global_loads: what `global_aux_loss` counts.
    """

    def __init__(
        self,
        moe: MoEConfig,
        num_moe_layers: int,
        tp_group: Group = None,
        dp_group: Group = None,
    ) -> None:
        self.num_experts = moe.num_experts
        weights, z = moe.openmoe_coefficients(num_moe_layers)
        kinds = ("none" if k == "quantile_balancing" else k for k in moe.load_balancing_types)
        self.balance = [(k, w / num_moe_layers) for k, w in zip(kinds, weights, strict=True)]
        self.z_weight = z / num_moe_layers
        self.tp_group, self.global_loads = tp_group, GlobalLoads(dp_group)

    def attach(
        self, scores: Scores, plan: Plan, training: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Let the losses take part in the backward pass of what is made from the result.

        Args:
            scores: of this rank's tokens.
            plan: combine weights and choices of all tokens of the sequences.
            training: whether the pass belongs to a step; `global_aux_loss` is of the micro-batch
                alone otherwise.

        Returns:
            The combine weights of the plan, and this rank's shares of the first balance loss, of
            the z-loss and of further balance losses, without coefficients and gradient, for the
            statistics.
        """
        counted_TK = self._counted(scores, plan)
        tokens: int | Tensor = plan.choices_TK.shape[0]
        real_T = None
        if plan.padding_T is not None:
            local = scores.choices_TK.shape[0]
            real_T = ~plan.padding_T.narrow(0, rank_of(self.tp_group) * local, local)
            tokens = (~plan.padding_T).sum().clamp(min=1).to(scores.probs_TE.dtype)
            scores = replace(scores, log_z_T=scores.log_z_T.where(real_T, 0.0))
        terms = []
        for kind, weight in self.balance:
            load_PE = self._loads(kind, counted_TK, plan)
            parts: int | Tensor = load_PE.shape[0]
            loaded: int | Tensor | None = None
            if kind == "global_aux_loss" and self.global_loads.counts(training):
                load_PE, loaded = self._global(load_PE, plan)
            elif real_T is not None:
                load_PE, parts = among_real(load_PE, tokens, plan.choices_TK.shape[1])
            load_QE = self._of_tokens(kind, load_PE, plan, scores.choices_TK.shape[0])
            if real_T is not None:
                load_QE = load_QE.repeat(len(real_T) // len(load_QE), 1) * real_T.unsqueeze(1)
            terms.append(
                BalanceTerm(load_QE=load_QE, parts=parts, load_tokens=loaded, weight=weight)
            )
        rule, kernel = LossRule(tokens=tokens, z_weight=self.z_weight), plan.kernels.router
        weights_TK, *losses = attach_losses(plan.weights_TK, scores, terms, rule, kernel)
        return weights_TK, tuple(losses)

    def _global(self, load_PE: Tensor, plan: Plan) -> tuple[Tensor, int | Tensor]:
        """Loads of the global batch so far, [1, E], and of how many tokens."""
        load_E, micro_batches = self.global_loads.add(load_PE.sum(0))
        tokens: int | Tensor = plan.choices_TK.shape[0] * micro_batches
        if plan.padding_T is not None:
            tokens = (load_E.sum() / plan.choices_TK.shape[1]).clamp(min=1)
        return load_E.unsqueeze(0), tokens

    def _counted(self, scores: Scores, plan: Plan) -> Tensor | None:
        """The choices that count, of all tokens of the sequences; `None` for those of the plan."""
        if scores.balance_TK is None or all(kind == "none" for kind, _ in self.balance):
            return None
        # int32 holds any expert id and is half of what would travel.
        return all_gather(scores.balance_TK.int(), self.tp_group).long()

    def _loads(self, kind: str, counted_TK: Tensor | None, plan: Plan) -> Tensor:
        """Choices of each part of the micro-batch that is balanced for itself, without padding.

        Args:
            kind: of the balance loss.
            counted_TK: see `_counted`.
            plan: of the pass.

        Returns:
            [P, E]; zeros of one part without a balance loss.
        """
        experts, rows = self.num_experts, plan.batch
        if kind == "none":
            return plan.choices_TK.new_zeros(1, experts)
        by_group = kind == "group_aux_loss"
        if counted_TK is None and (by_group or plan.capacity.groups == rows):
            load_PE = plan.slots.load_GE  # Groups are counted already.
        else:
            chosen_TK = plan.choices_TK if counted_TK is None else counted_TK
            if plan.padding_T is not None:  # counts as an expert past the last
                chosen_TK = chosen_TK.masked_fill(plan.padding_T.unsqueeze(1), experts)
            if by_group:
                load_PE = _counts(by_priority(chosen_TK, rows, plan.capacity), experts + 1)
            else:
                load_PE = load_per_row(chosen_TK, rows, experts + 1)
            load_PE = load_PE[:, :experts].contiguous()
        whole = kind in ("aux_loss", "global_aux_loss")
        return load_PE.sum(0, keepdim=True) if whole else load_PE

    def _of_tokens(self, kind: str, load_PE: Tensor, plan: Plan, local_tokens: int) -> Tensor:
        """The load of the part of each token of this rank, [Q, E]: of token t, entry t % Q."""
        rows = plan.batch
        if kind != "group_aux_loss" or plan.capacity.groups == rows:
            return load_PE.expand(rows, -1)
        first = rank_of(self.tp_group) * (local_tokens // rows)
        return load_per_group(load_PE, rows, plan.capacity, first, local_tokens)


def among_real(load_PE: Tensor, tokens: int | Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """What a balance loss is computed from where padding is ignored.

    The mean over n parts of E * sum_e (load_e / T_p) (mass_e / T_p) in the form of `BalanceTerm`,
    which has parts of equal size: loads of a part of T_p real tokens count (T / n / T_p)^2 times,
    where T / n is the mean. Parts without a real token are none.

    Args:
        load_PE: choices of the real tokens of each part, K of each token.
        tokens: real ones T of the micro-batch.
        topk: K.

    Returns:
        Loads [P, E] and the number of parts n.
    """
    real_P = load_PE.sum(1) // topk
    parts = (real_P > 0).sum().clamp(min=1)
    scale_P = (tokens / parts / real_P.clamp(min=1)).square()
    return load_PE * scale_P.unsqueeze(1), parts


def load_per_row(choices_TK: Tensor, batch: int, num_experts: int) -> Tensor:
    """Choices per row and expert, [B, E] int64, of tokens in (sequence, batch) order."""
    tokens, topk = choices_TK.shape
    choices_BA = choices_TK.view(tokens // batch, batch, topk).transpose(0, 1).reshape(batch, -1)
    return _counts(choices_BA, num_experts)


def _counts(choices_GA: Tensor, num_experts: int) -> Tensor:
    """Choices of each group and expert, [G, E] int64."""
    load_GE = choices_GA.new_zeros(choices_GA.shape[0], num_experts)
    return load_GE.scatter_add_(1, choices_GA, torch.ones_like(choices_GA))


def load_per_group(
    load_GE: Tensor, batch: int, capacity: Capacity, first: int, local_tokens: int
) -> Tensor:
    """The load of each token's capacity group, [Q, E].

    Example, B = 2 rows of 4 tokens. One group of both rows: Q = 2, each with the load of the group.
    Groups of 2 tokens, 0 and 1 in row 0, 2 and 3 in row 1: this rank's tokens, position by
    position, are of the groups 0 2 0 2 1 3 1 3, Q = 8; of two ranks the second has 1 3 1 3.

    Args:
        load_GE: choices of each group over all ranks that share it, groups in row order.
        batch: rows B.
        capacity: size and number of the groups.
        first: position in its row of this rank's first token.
        local_tokens: T, tokens of this rank in (sequence, batch) order.
    """
    device = load_GE.device
    row_B = torch.arange(batch, device=device)
    if capacity.groups < batch:  # Groups are whole rows.
        return load_GE[row_B // (batch // capacity.groups)]
    part_S = torch.arange(first, first + local_tokens // batch, device=device)
    part_S = part_S // capacity.group_size
    group_T = (row_B * (capacity.groups // batch) + part_S.unsqueeze(1)).view(-1)
    return load_GE[group_T]


@dataclass(frozen=True, kw_only=True)
class BalanceTerm:
    """One balance loss.

    Args:
        load_QE: choices of a part of the micro-batch, over all ranks that share it: entry t % Q is
            that of the part of token t. Zeros: no balance loss. int64; or of `among_real`, with
            Q = T and zeros at padding.
        parts: equal parts of the micro-batch over whose balance losses the mean is taken.
        load_tokens: tokens whose choices these are, if not those of the micro-batch.
        weight: factor of the loss.
    """

    load_QE: Tensor
    parts: int | Tensor = 1
    load_tokens: int | Tensor | None = None
    weight: float = 1.0

    def factor(self, tokens: int | Tensor) -> float | Tensor:
        """Of the sum over tokens of p_e load_e, T tokens in the micro-batch.

        With mass_e the summed probability of expert e: the mean over P parts of
        E * sum_e (load_e / T_p) (mass_e / T_p), T_p = T / P, is the sum over tokens of p_e load_e,
        with the load of the token's part, times E * P / T^2.
        """
        loaded = tokens if self.load_tokens is None else self.load_tokens
        return self.load_QE.shape[1] * self.parts / (tokens * loaded)


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """How the losses are computed and weighted.

    Args:
        tokens: tokens of the micro-batch over the ranks that share its rows; only real ones where
            padding is ignored, then a scalar on the device.
        z_weight: factor of the z-loss.
    """

    tokens: int | Tensor
    z_weight: float = 1.0


def attach_losses(
    weights_TK: Tensor,
    scores: Scores,
    terms: Sequence[BalanceTerm],
    rule: LossRule,
    kernel: RouterKernel = reference,
) -> tuple[Tensor, ...]:
    """`RouterLosses.attach` as a function.

    Args:
        weights_TK: combine weights, of this rank's tokens or of more.
        scores: of this rank's tokens.
        terms: at least one balance loss.
        rule: formula and weights.
        kernel: the implementation of the sums.

    Returns:
        The combine weights, and this rank's shares of the first balance loss, of the z-loss and of
        the other balance losses.
    """
    return _AttachLosses.apply(weights_TK, scores.probs_TE, scores.log_z_T, terms, rule, kernel)


class _AttachLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor,
        probs_TE: Tensor,
        log_z_T: Tensor,
        terms: Sequence[BalanceTerm],
        rule: LossRule,
        kernel: RouterKernel,
    ) -> tuple[Tensor, ...]:
        factors = [term.factor(rule.tokens) for term in terms]
        balances = []
        for term, factor in zip(terms, factors, strict=True):
            # Kernels have loads that are counts.
            sums = reference.loss_sums if term.load_QE.is_floating_point() else kernel.loss_sums
            balance, z = sums(probs_TE, log_z_T, term.load_QE)  # z is the same each time
            balances.append(balance * factor)
        losses = balances[0], z / rule.tokens, *balances[1:]
        ctx.save_for_backward(log_z_T, *(term.load_QE.to(probs_TE.dtype) for term in terms))
        ctx.tokens = probs_TE.shape[0]
        ctx.balance = [term.weight * factor for term, factor in zip(terms, factors, strict=True)]
        ctx.z = 2 * rule.z_weight / rule.tokens
        ctx.mark_non_differentiable(*losses)
        ctx.set_materialize_grads(False)
        return weights_TK, *losses

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        log_z_T, *loads = ctx.saved_tensors
        scale = _main_loss_scale()
        log_z_T, *slopes = (
            x * (weight * scale if scale is not None else weight)
            for x, weight in zip((log_z_T, *loads), (ctx.z, *ctx.balance), strict=True)
        )
        probs_TE, *more = (
            slope_QE.expand(ctx.tokens // len(slope_QE), *slope_QE.shape).flatten(0, 1)
            for slope_QE in slopes
        )
        for other_TE in more:
            probs_TE = probs_TE + other_TE
        return grads[0], probs_TE, log_z_T, None, None, None


def _main_loss_scale() -> Tensor | None:
    """The factor on attached losses. Before each backward pass, Megatron-Core's schedule sets it to
    the scale of the main loss of a micro-batch; `None` outside a schedule means 1.
    """
    # Imported here: Megatron-Core takes seconds to import and a forward pass does not need it.
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    return MoEAuxLossAutoScaler.main_loss_backward_scale
