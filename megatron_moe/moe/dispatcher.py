"""Moves tokens to the rows of their experts and back.

`TokenDispatcher.plan` decides everything beforehand: capacity, slots, buffer rows. `dispatch` then
gathers sequence shards, copies tokens into buffer rows and sends rows to the ranks of their
experts; `combine` is the way back. `exchange.py` describes what travels between ranks.

Shapes: T tokens of this rank's sequences, H hidden, K choices of a token, E experts, R buffer rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.operations import CombineTokens, DispatchTokens
from megatron_moe.config import MoEConfig
from megatron_moe.moe.bounded_buffer import BufferBound, assign_bounded, buffer_bound
from megatron_moe.moe.dropping import DROP_POLICIES, OUTSIDE_TRAINING, Draw
from megatron_moe.moe.exchange import ExpertGroups, all_gather, rank_of, reduce_scatter, size_of
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.overlap import Flight
from megatron_moe.moe.plan import (
    Placement,
    Plan,
    SlotRule,
    assign_slots,
    capacity_of,
    place,
)
from megatron_moe.moe.registry import Registry, kernels_for
from megatron_moe.moe.scoring import Scores


class TokenDispatcher:
    """The dispatcher of one MoE layer: all-to-all over expert-parallel ranks.

    Other dispatchers derive from it, override how tokens travel and register in `DISPATCHERS`.

    Args:
        moe: capacity, drop policy, kernels.
        groups: process groups of the layer.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups) -> None:
        self.moe, self.groups = moe, groups
        shares = groups.slot_shares
        self.slot_rule = SlotRule(
            num_experts=moe.num_experts,
            policy=DROP_POLICIES[moe.moe_token_drop_policy],
            shares=shares,
            share=rank_of(groups.tp) if shares > 1 else 0,
        )

    def plan(
        self,
        scores: Scores,
        batch: int,
        training: bool,
        experts: Experts,
        draw: Draw = OUTSIDE_TRAINING,
        padding_T: Tensor | None = None,
    ) -> Plan:
        """Decide what goes where, on every rank of the sequences alike.

        Args:
            scores: of this rank's tokens.
            batch: sequences B of the micro-batch.
            training: whether the training or the evaluation capacity applies.
            experts: choose the buffer layout, by the rows that they get.
            draw: what the drop policy may depend on besides the choices.
            padding_T: bool, which of this rank's tokens are not to be routed; `None` for none.
        """
        kernels = kernels_for(self.moe, scores.choices_TK.device.type)
        choices_TK, padding_T = self._gather_choices(scores.choices_TK, padding_T)
        row_tokens = choices_TK.shape[0] // batch
        capacity = capacity_of(self.moe, rows=batch, row_tokens=row_tokens, training=training)
        weights_TK = all_gather(scores.weights_TK, self.groups.tp)
        asked = choices_TK, weights_TK, batch, capacity, self.slot_rule
        bound, rank_in_expert = self.bound(choices_TK.numel(), training), kernels.rank_in_expert
        if bound is None:
            slots = assign_slots(*asked, rank_in_expert, draw, padding_T)
        else:
            slots = assign_bounded(*asked, bound, rank_in_expert, draw, padding_T)
        schedule = experts.schedule(slots)
        chunks = schedule.layout.chunks
        flight = None if chunks is None else Flight(chunks, experts.num_local, self.groups)
        return Plan(
            batch=batch,
            capacity=capacity,
            choices_TK=choices_TK,
            weights_TK=weights_TK,
            padding_T=padding_T,
            slots=slots,
            schedule=schedule,
            placement=place(slots, batch, capacity, schedule.layout),
            kernels=kernels,
            flight=flight,
        )

    def bound(self, choices: int, training: bool) -> BufferBound | None:
        """The bound of the buffer of a pass with so many choices; see `buffer_bound`."""
        return buffer_bound(
            self.moe,
            choices=choices,
            ranks=size_of(self.groups.ep),
            shares=self.slot_rule.shares,
            training=training,
        )

    def _gather_choices(
        self, choices_TK: Tensor, padding_T: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Choices of all tokens of the sequences, and which are padding; without gradient."""
        if size_of(self.groups.tp) == 1:
            return choices_TK, padding_T
        # int32 holds any expert id and is half of what would travel. Padding travels as the sign.
        sent_TK = choices_TK.int()
        if padding_T is not None:
            sent_TK = torch.where(padding_T.unsqueeze(1), -1 - sent_TK, sent_TK)
        choices_TK = all_gather(sent_TK, self.groups.tp).long()
        if padding_T is None:
            return choices_TK, None
        padding_T = choices_TK[:, 0] < 0
        return torch.where(padding_T.unsqueeze(1), -1 - choices_TK, choices_TK), padding_T

    def dispatch(self, x_TH: Tensor, plan: Plan) -> Tensor:
        """This rank's tokens -> rows of this rank's experts, from all ranks that send any.

        With a flight they arrive later; see `Flight.launch`.
        """
        x_TH = all_gather(x_TH, self.groups.tp)
        rows_RH = copy_to_rows(x_TH, plan.placement, plan.kernels.dispatch_tokens)
        return (
            self.groups.to_experts(rows_RH) if plan.flight is None else plan.flight.launch(rows_RH)
        )

    def combine(self, rows_RH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
        """Outputs of this rank's experts -> the weighted sums of this rank's tokens, [T, H].

        With a flight the experts have sent their outputs back already. A token whose choices all
        dropped gets exactly zero.
        """
        if plan.flight is None:
            rows_RH = self.groups.from_experts(rows_RH)
        kernel = plan.kernels.combine_tokens
        y_TH = sum_rows(rows_RH, weights_TK, plan.placement, kernel)
        # Ranks that divide the slots or the width of experts among them hold partial sums.
        return reduce_scatter(y_TH, self.groups.tp)


DISPATCHERS: Registry[type[TokenDispatcher]] = Registry("dispatchers", alltoall=TokenDispatcher)
"""By the value of `--moe-token-dispatcher-type`."""


class _CopyToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, placement: Placement, kernel: DispatchTokens) -> Tensor:
        ctx.save_for_backward(placement.rows_TK, placement.owned_TK)
        ctx.kernel = kernel
        # An expert that computes its empty rows as well gets zeros there. With a token that another
        # expert was chosen for, its output may overflow, and zero gradients times infinity are NaN.
        return kernel.forward(x_TH, placement.copied_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_RH: Tensor, weights_TK: Tensor, placement: Placement, kernel: CombineTokens
    ) -> Tensor:
        choices = (out_RH, weights_TK, placement.rows_TK, placement.owned_TK)
        ctx.save_for_backward(*choices, placement.source_R)
        ctx.kernel = kernel
        return kernel.forward(*choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *ctx.kernel.backward(grads[0], *ctx.saved_tensors), None, None


def copy_to_rows(x_TH: Tensor, placement: Placement, kernel: DispatchTokens) -> Tensor:
    """Copy tokens into their rows, [R, H]. The gradient sums over a token's rows.

    Empty rows are zero where experts compute them, else arbitrary.
    """
    return _CopyToRows.apply(x_TH, placement, kernel)


def sum_rows(
    out_RH: Tensor, weights_TK: Tensor, placement: Placement, kernel: CombineTokens
) -> Tensor:
    """Sum a token's rows with their weights, [T, H]; dropped choices add nothing."""
    return _SumRows.apply(out_RH, weights_TK, placement, kernel)
