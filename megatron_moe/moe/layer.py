"""The mixture-of-experts layer: route, plan, dispatch, experts, combine.

Shapes: S sequence (this rank's shard under sequence parallelism), B batch, H hidden, T = S * B
tokens in (sequence, batch) order, K choices, E experts, R buffer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_kernels import Kernel
from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe import losses
from megatron_moe.moe.capacity import Capacity, capacity_of
from megatron_moe.moe.exchange import ExpertGroups, all_gather, rank_of, reduce_scatter, size_of
from megatron_moe.moe.experts import ExpertImpl, Experts, ExpertWork, choose_impl, is_readable
from megatron_moe.moe.kernels import kernels_of
from megatron_moe.moe.plan import BufferLayout, Plan, make_plan
from megatron_moe.moe.router import Scores, route
from megatron_moe.moe.slots import SlotRule, Slots, assign_slots
from megatron_moe.moe.statistics import RoutingCounter
from megatron_moe.moe.transfer import combine, dispatch


@dataclass(frozen=True)
class Routing:
    """Every decision of one forward pass, for whoever wants to see it.

    Args:
        scores: of this rank's tokens.
        kept_TK: bool, which of their choices were not dropped.
        capacity: groups and slots.
    """

    scores: Scores
    kept_TK: Tensor
    capacity: Capacity


class MoELayer(nn.Module):
    """Experts, their router and the exchange between ranks; no shared expert.

    Args:
        model: sizes and feed-forward variant.
        moe: routing, capacity, losses, implementations.
        layer_number: 0-based index of the transformer layer.
        num_moe_layers: MoE layers of the whole model, over which losses are averaged.
        pgs: `ProcessGroupCollection` with `tp`, `ep` and `expt_tp`; `None` for one process.
        sequence_parallel: whether the input is this rank's shard of the sequence.
        params_dtype: dtype of the parameters; the router computes in fp32 whatever it is.
        device: where the parameters are. They are uninitialised; see `reset_parameters`.

    Attributes:
        router_weight: [E, H].
        experts: the weights, `experts.weight_in` and `experts.weight_out`.
        on_routing: called with the `Routing` of each forward pass; `None` for nobody.

    Raises:
        UsageError: experts or their width do not divide; tensor parallelism without sequence
            parallelism; a kernel or expert implementation that is not available here.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        *,
        layer_number: int,
        num_moe_layers: int,
        pgs: Any = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.groups = ExpertGroups.of(pgs)
        self.shards = size_of(self.groups.tp)
        if self.shards > 1 and not sequence_parallel:
            found = f"off with --tensor-model-parallel-size {self.shards}"
            raise UsageError("--sequence-parallel", found, "on: expert layers shard the sequence")
        self.model, self.moe = model, moe
        self.layer_number, self.num_moe_layers = layer_number, num_moe_layers
        shape = (moe.num_experts, model.hidden_size)
        self.router_weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        # The engine sums the gradients of such parameters over tensor-parallel ranks.
        self.router_weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.experts = Experts(model, moe, self.groups, params_dtype, device)
        shares = self.groups.slot_shares
        self.slot_rule = SlotRule(
            num_experts=moe.num_experts,
            policy=moe.moe_token_drop_policy,
            shares=shares,
            share=rank_of(self.groups.tp) if shares > 1 else 0,
        )
        self.counter = RoutingCounter(layer_number, moe.num_experts, device)
        self.on_routing: Callable[[Routing], None] | None = None
        _ = self.kernels  # Refused now, if they are to be.

    @property
    def kernels(self) -> dict[str, Kernel]:
        """By operation, for where the weights are: a layer may be moved."""
        return kernels_of(self.moe.moe_dispatch_impl, self.router_weight.device.type)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """The weighted sum of each token's experts; zero for a token whose choices all dropped.

        The losses of the router are attached to the result: they enter the backward pass, not the
        value. Training or evaluation capacity follows `self.training`.
        """
        batch, hidden = x_SBH.shape[1:]
        x_TH = x_SBH.reshape(-1, hidden)
        scores, x_TH = route(x_TH, self.router_weight, self.moe.moe_router_topk)
        choices_TK = self._gather_choices(scores.choices_TK)
        row_tokens = choices_TK.shape[0] // batch
        capacity = capacity_of(self.moe, rows=batch, row_tokens=row_tokens, training=self.training)
        weights_TK = all_gather(scores.weights_TK, self.groups.tp)
        kernel = self.kernels["rank_in_expert"].module
        slots = assign_slots(choices_TK, weights_TK, batch, capacity, self.slot_rule, kernel)
        load_BE = self._load_per_row(choices_TK, slots, capacity, batch)
        rule = self._loss_rule(choices_TK.shape[0])
        weights_TK, *shares = losses.attach_losses(weights_TK, scores, load_BE, rule)
        filled_E = slots.filled_GE.sum(0)
        impl = choose_impl(self.moe.moe_expert_impl, self._work(filled_E))
        layout = self._buffer_layout(impl, capacity)
        plan = make_plan(slots, batch, capacity, layout)
        self._record(scores, slots, plan, capacity, shares)
        x_TH = all_gather(x_TH, self.groups.tp)
        y_TH = self._run_experts(x_TH, weights_TK, plan, filled_E, impl)
        return reduce_scatter(y_TH, self.groups.tp).view_as(x_SBH)

    def _gather_choices(self, choices_TK: Tensor) -> Tensor:
        """Choices of all tokens of the rows: small integers, without gradient."""
        if self.shards == 1:
            return choices_TK
        return all_gather(choices_TK.int(), self.groups.tp).long()

    def _loss_rule(self, tokens: int) -> losses.LossRule:
        """For a micro-batch of so many tokens."""
        moe, layers = self.moe, self.num_moe_layers
        return losses.LossRule(
            tokens=tokens,
            per_row=moe.moe_router_load_balancing_type == "seq_aux_loss",
            balance_weight=moe.moe_aux_loss_coeff / layers,
            z_weight=moe.moe_z_loss_coeff / layers,
        )

    def _load_per_row(
        self, choices_TK: Tensor, slots: Slots, capacity: Capacity, batch: int
    ) -> Tensor:
        """Choices [B, E] that the balance loss is made of; zeros without one."""
        if self.moe.moe_router_load_balancing_type == "none":
            return choices_TK.new_zeros(batch, self.moe.num_experts)
        if capacity.groups == batch:
            return slots.load_GE  # Every row is a group.
        return losses.load_per_row(choices_TK, batch, self.moe.num_experts)

    def _work(self, filled_E: Tensor) -> ExpertWork:
        """What the choice of expert GEMMs depends on."""
        readable = is_readable(filled_E)
        filled = filled_E.tolist() if readable and self.groups.sources == 1 else None
        return ExpertWork(
            readable=readable,
            filled=filled,
            multiply_adds=self.experts.weight_in[0].numel(),
            width=self.experts.weight_out.shape[1],
        )

    def _buffer_layout(self, impl: ExpertImpl, capacity: Capacity) -> BufferLayout:
        """The rows that an implementation wants."""
        rule, ranks = self.slot_rule, size_of(self.groups.ep)
        if impl.portions is not None:
            return BufferLayout.aligned([p.rows for p in impl.portions for _ in range(p.experts)])
        if impl.name == "batched":
            return BufferLayout.fixed(rule, capacity, ranks)
        choices = capacity.groups * capacity.group_size * self.moe.moe_router_topk
        return BufferLayout.packed(rule, capacity, ranks, choices)

    def _run_experts(
        self, x_TH: Tensor, weights_TK: Tensor, plan: Plan, filled_E: Tensor, impl: ExpertImpl
    ) -> Tensor:
        """Dispatch, compute, combine; partial sums where tokens or experts are shared."""
        rows = dispatch(x_TH, plan, self.kernels["dispatch_tokens"].module)
        rows = self.groups.to_experts(rows)
        rows = self.experts(rows, filled_E, impl, self.kernels["gated_silu"].module)
        rows = self.groups.from_experts(rows)
        return combine(rows, weights_TK, plan, self.kernels["combine_tokens"].module)

    def _record(
        self,
        scores: Scores,
        slots: Slots,
        plan: Plan,
        capacity: Capacity,
        shares: Sequence[Tensor],
    ) -> None:
        """Count this pass once and show it to the observer; ``shares`` of both losses.

        While training, a pass without gradients is the first pass of a checkpointed layer.
        """
        if self.training and not torch.is_grad_enabled():
            return
        rank = rank_of(self.groups.tp)
        # Every rank of the rows knows all their loads: the first one counts them.
        load_GE, kept_GE = (x[:0] if rank else x for x in (slots.load_GE, slots.full_GE))
        self.counter.add(scores, load_GE, kept_GE, shares, self.shards)
        if self.on_routing is not None:
            local = scores.choices_TK.shape[0]
            kept_TK = plan.kept_TK.narrow(0, rank * local, local)
            self.on_routing(Routing(scores, kept_TK, capacity))

    def describe(self, rows: int, row_tokens: int) -> str:
        """Which implementations run, and why; one line for the log.

        On one CPU rank `auto` decides by the loads of each pass; this is its choice for even ones.

        Args:
            rows: sequences B of the micro-batch.
            row_tokens: tokens S of a sequence, over all ranks that share it.
        """
        mean = max(1, rows * row_tokens * self.moe.moe_router_topk // self.moe.num_experts)
        even_E = torch.full_like(self.counter.sums[: self.moe.num_experts], mean).long()
        impl = choose_impl(self.moe.moe_expert_impl, self._work(even_E))
        kernel = self.kernels["dispatch_tokens"]
        return (
            f"MoE experts: {impl.name} ({impl.reason}); "
            f"dispatch kernels: {kernel.implementation} ({kernel.reason})"
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill with the model's standard deviations, for a layer that stands alone."""
        generator = torch.Generator(self.router_weight.device).manual_seed(seed)
        self.router_weight.normal_(0.0, self.model.router_init_method_std, generator=generator)
        self.experts.reset_parameters(self.model.init_variance_scale, seed + 1)
