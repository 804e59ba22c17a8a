"""The mixture-of-experts layer: route, plan, dispatch, experts, combine.

`MoELayer.forward` is the whole of it; each line is one object with a file of its own.

Shapes: S sequence (this rank's shard under sequence parallelism), B batch, H hidden, T = S * B
tokens in (sequence, batch) order, K choices, E experts, G capacity groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe.adaptive_capacity import DropsBySize
from megatron_moe.moe.counter import RoutingCounter, TokenFates
from megatron_moe.moe.dispatcher import DISPATCHERS
from megatron_moe.moe.document_pools import restricted
from megatron_moe.moe.dropping import Draw
from megatron_moe.moe.exchange import ExpertGroups, rank_of, size_of
from megatron_moe.moe.experts import Experts, MakeExperts, StackedExperts
from megatron_moe.moe.forced import force_balance
from megatron_moe.moe.losses import RouterLosses
from megatron_moe.moe.plan import Capacity, Plan
from megatron_moe.moe.registry import kernels_for
from megatron_moe.moe.router import ROUTERS
from megatron_moe.moe.scoring import Scores


@dataclass(frozen=True)
class RoutingDecision:
    """What one forward pass decided, for an observer.

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
        num_moe_layers: MoE layers of the whole model, for the weight of the losses.
        pgs: `ProcessGroupCollection` with `tp`, `ep` and `expt_tp`; `None` for one process.
        sequence_parallel: whether the input is this rank's shard of the sequence.
        params_dtype: dtype of the parameters; the router computes in at least fp32.
        device: where the parameters are. They are uninitialized; see `reset_parameters`.
        make_experts: builds the experts; `None` for `StackedExperts`.

    Attributes:
        router: scores tokens and chooses their experts.
        dispatcher: capacity, slots, buffer rows, exchanges.
        draw: seed and step of passes in training mode, for the drop policy; see `begin_step`.
        experts: weights and GEMMs.
        losses: balance and z-loss.
        statistics: counts every pass.
        drops_by_size: what other capacities would drop, with `--moe-target-drop-rate`.
        replace_scores: called with the scores of each pass, to return others; see `moe/replay.py`.
        on_routing: called with the `RoutingDecision` of each forward pass, if not `None`.

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
        make_experts: MakeExperts | None = None,
    ) -> None:
        super().__init__()
        groups = ExpertGroups.of(pgs)
        if size_of(groups.tp) > 1 and not sequence_parallel:
            expected = f"on with --tensor-model-parallel-size {size_of(groups.tp)}"
            fix = "expert layers shard the sequence"
            raise UsageError("--sequence-parallel", "off", expected, fix)
        moe = moe.of_layer(layer_number, model.num_layers)
        self.model, self.moe, self.groups = model, moe, groups
        self.layer_number, self.num_moe_layers = layer_number, num_moe_layers
        self.router = ROUTERS[moe.moe_router_type](
            model,
            moe,
            sequence_parallel=sequence_parallel,
            tp_group=groups.tp,
            params_dtype=params_dtype,
            device=device,
        )
        self.dispatcher = DISPATCHERS[moe.moe_token_dispatcher_type](moe, groups)
        self.draw = Draw(layer=layer_number)
        if make_experts is None:
            self.experts: Experts = StackedExperts(model, moe, groups, params_dtype, device)
        else:
            self.experts = make_experts(groups)
        self.losses = RouterLosses(moe, num_moe_layers, groups.tp, getattr(pgs, "dp", None))
        counted = moe.num_experts, moe.moe_router_topk, device, len(moe.load_balancing_types)
        self.statistics = RoutingCounter(layer_number, *counted)
        self.drops_by_size = None
        if moe.moe_target_drop_rate is not None:
            self.drops_by_size = DropsBySize(moe, device)
        self.replace_scores: Callable[[Scores], Scores] | None = None
        self.on_routing: Callable[[RoutingDecision], None] | None = None
        # Raises now, not in the first step, if the requested kernels are not available.
        kernels_for(moe, self.router.weight.device.type)

    def forward(
        self,
        x_SBH: Tensor,
        padding_SB: Tensor | None = None,
        beside: Callable[[], Tensor] | None = None,
        ids_SB: Tensor | None = None,
        documents_SB: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts; zero for a token whose choices all dropped.

        The losses of the router are attached to the result: they enter the backward pass, not the
        value. Training or evaluation capacity follows `self.training`.

        Args:
            x_SBH: this rank's tokens.
            padding_SB: bool, which of them are padding; `None` for none. With
                `--moe-ignore-padding-tokens` their output is zero, and they count nowhere;
                without, they are routed like any token and counted apart in the statistics.
            beside: something to add to the result, computed while tokens are on their way to their
                experts. `None` for nothing.
            ids_SB: of these tokens, for a router that needs them.
            documents_SB: number of each token's document in its row; `None`: each row is one.
        """
        batch, hidden = x_SBH.shape[1:]
        scores, x_TH = self._route(x_SBH.reshape(-1, hidden), batch, ids_SB, documents_SB)
        draw = self.draw if self.training else Draw(layer=self.layer_number)
        padding_T = None if padding_SB is None else padding_SB.reshape(-1)
        ignored_T = padding_T if self.moe.moe_ignore_padding_tokens else None
        plan = self.dispatcher.plan(scores, batch, self.training, self.experts, draw, ignored_T)
        weights_TK, losses = self.losses.attach(scores, plan, self.training)
        rows_RH = self.dispatcher.dispatch(x_TH, replace(plan, weights_TK=weights_TK))
        # With exchanges that overlap, what follows does not wait for these rows; the experts do.
        self._observe(scores, plan, losses, padding_T)
        other_SBH = None if beside is None else beside()
        rows_RH = self.experts(rows_RH, plan)
        y_SBH = self.dispatcher.combine(rows_RH, weights_TK, plan).view_as(x_SBH)
        return y_SBH if other_SBH is None else y_SBH + other_SBH

    def _in_pools(self, scores: Scores, batch: int, documents_SB: Tensor | None) -> Scores:
        sizes = self.moe.moe_router_document_pool
        assert sizes is not None
        documents_T = torch.zeros_like(scores.choices_TK[:, 0])
        if documents_SB is not None:
            documents_T = documents_SB.reshape(-1)
        return restricted(
            scores,
            self.router.rule,
            documents_T,
            rows=batch,
            sizes=sizes,
            draw=self.draw,
            bias_E=self.router.bias_E,
            tp_group=self.groups.tp,
        )

    @property
    def overlaps(self) -> bool:
        """Whether exchanges overlap with computation."""
        return self.experts.chunks > 1

    def set_capacity_factor(self, factor: float) -> None:
        """Change the capacity factor of training from the next pass on."""
        self.dispatcher.moe = replace(self.dispatcher.moe, moe_expert_capacity_factor=factor)

    def _route(
        self, x_TH: Tensor, batch: int, ids_SB: Tensor | None, documents_SB: Tensor | None
    ) -> tuple[Scores, Tensor]:
        """Scores, and the tokens to use from here on; see `Router.forward`."""
        ids_T = None if ids_SB is None else ids_SB.reshape(-1)
        jitter = self.moe.moe_input_jitter_eps
        if jitter and self.training:
            noise_TH = torch.empty_like(x_TH).uniform_(1.0 - jitter, 1.0 + jitter)
            scores, _ = self.router(x_TH * noise_TH, batch, ids_T)
        else:
            scores, x_TH = self.router(x_TH, batch, ids_T)
        if self.moe.moe_router_document_pool is not None and self.training:
            scores = self._in_pools(scores, batch, documents_SB)
        if self.moe.moe_router_force_load_balancing:
            scores = force_balance(scores, self.layer_number, self.router.weights_of)
        if self.replace_scores is not None:
            scores = self.replace_scores(scores)
        return scores, x_TH

    def _observe(
        self, scores: Scores, plan: Plan, losses: Sequence[Tensor], padding_T: Tensor | None
    ) -> None:
        """Count this pass and call the observer.

        With recomputation a checkpointed layer runs twice: the first pass has no gradients although
        the layer is training, and does not count.
        """
        if self.training and not torch.is_grad_enabled():
            return
        shards, rank, slots = size_of(self.groups.tp), rank_of(self.groups.tp), plan.slots
        # Every rank of the sequences has the loads of all their tokens: the first one counts them.
        load_GE, kept_GE = (x[:0] if rank else x for x in (slots.load_GE, slots.full_GE))
        local = scores.choices_TK.shape[0]
        kept_TK = plan.placement.kept_TK.narrow(0, rank * local, local)
        fates = TokenFates(
            kept_TK=kept_TK,
            batch=plan.batch,
            shard=rank,
            shards=shards,
            padding_T=padding_T,
            ignored=plan.padding_T is not None,
            slots=0 if rank else plan.capacity.slots * plan.capacity.groups * self.moe.num_experts,
        )
        self.statistics.add(scores, load_GE, kept_GE, losses, fates)
        if self.training and self.drops_by_size is not None:
            self.drops_by_size.add(slots.load_GE, plan.capacity)
        if self.training and self.router.expert_bias is not None:
            ignored_T = None if plan.padding_T is None else padding_T
            self.router.expert_bias.count(scores, load_GE.sum(0), ignored_T)
        if self.on_routing is not None:
            self.on_routing(RoutingDecision(scores, kept_TK, plan.capacity))

    def describe(self, rows: int, row_tokens: int) -> str:
        """Which implementations run, and why; one line for the log.

        On one CPU rank `auto` decides by the loads of each pass; this is its choice for even ones.

        Args:
            rows: sequences B of the micro-batch.
            row_tokens: tokens S of a sequence, over all ranks that share it.
        """
        experts, weight = self.moe.num_experts, self.router.weight
        mean = max(1, rows * row_tokens * self.moe.moe_router_topk // experts)
        even_E = weight.new_full((experts,), mean, dtype=torch.int64)
        impl = self.experts.choose(even_E)
        selected = kernels_for(self.moe, weight.device.type).selected
        kernel = next(kernel for kernel in selected if kernel.operation == "dispatch_tokens")
        return (
            f"MoE experts: {impl.name} ({impl.reason}); "
            f"kernels: {kernel.implementation} ({kernel.reason})"
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill with the model's standard deviations, for a layer outside of a model."""
        generator = torch.Generator(self.router.weight.device).manual_seed(seed)
        self.router.reset_parameters(generator)
        self.experts.reset_parameters(seed + 1)
