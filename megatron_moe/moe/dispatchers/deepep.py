"""The dispatcher `deepep`: tokens travel once to each rank that has an expert of theirs.

Through Megatron-Core's `fused_a2a.py`, a wrapper of DeepEP's kernels for NVLink and RDMA (package
`deep_ep`). The all-to-all of rows sends a token K times and every empty slot with it; DeepEP sends
it once to each rank, with the ids and weights of its experts there, and sums the weighted outputs
on the way back. What drops is decided before, as for any dispatcher: choices without a slot are
sent as -1.

How many tokens arrive depends on the loads, and DeepEP tells the host: a step waits for the device
in every layer, and cannot be captured in a CUDA graph. Rows are sorted by expert and computed by
grouped GEMMs.

Shapes: T tokens of this rank's sequences, H hidden, K choices, N tokens that arrive, E experts of
this rank, R rows: choices of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_kernels.operations import RankInExpert
from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe.dispatcher import DISPATCHERS, TokenDispatcher, copy_to_rows, sum_rows
from megatron_moe.moe.dropping import OUTSIDE_TRAINING, Draw
from megatron_moe.moe.exchange import ExpertGroups, all_gather, reduce_scatter, size_of
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.grouped_gemm import Arrival
from megatron_moe.moe.plan import Placement, Plan
from megatron_moe.moe.scoring import Scores

FLAG = "--moe-token-dispatcher-type"


@dataclass
class FusedArrival(Arrival):
    """What one pass needs again on the way back.

    Args:
        placement: rows of the choices of each token that arrived.
        weights_NK: of these choices; zero where the expert is on another rank.
        handle: DeepEP's, of the way that the tokens came.
    """

    placement: Placement | None = None
    weights_NK: Tensor | None = None
    handle: Any = None


@DISPATCHERS.register("deepep")
class FusedDispatcher(TokenDispatcher):
    """Tokens travel by DeepEP.

    Args:
        moe: `--moe-expert-impl` must be `grouped`.
        groups: expert parallelism, and no ranks that share an expert.

    Raises:
        UsageError: DeepEP is not installed, or the layout or the experts do not fit.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups) -> None:
        super().__init__(moe, groups)
        if moe.moe_expert_impl != "grouped" or moe.moe_dropless_buffer_factor is not None:
            expected = "alltoall without --moe-expert-impl grouped"
            if moe.moe_expert_impl == "grouped":
                expected = "alltoall with --moe-dropless-buffer-factor"
            fix = "DeepEP's buffers have as many rows as arrive, for grouped GEMMs"
            raise UsageError(FLAG, "deepep", expected, fix)
        if size_of(groups.ep) == 1 or groups.gather_rows:
            expected = "alltoall without expert parallelism, or with expert tensor parallelism"
            raise UsageError(FLAG, "deepep", expected, "DeepEP sends each token to the ranks of EP")
        self._send, self._collect = fused_exchange()

    def plan(
        self,
        scores: Scores,
        batch: int,
        training: bool,
        experts: Experts,
        draw: Draw = OUTSIDE_TRAINING,
        padding_T: Tensor | None = None,
    ) -> Plan:
        """As of any dispatcher; `dispatch` fills in what arrived."""
        plan = super().plan(scores, batch, training, experts, draw, padding_T)
        return replace(plan, arrival=FusedArrival())

    def dispatch(self, x_TH: Tensor, plan: Plan) -> Tensor:
        """This rank's tokens -> rows of this rank's experts, sorted by expert."""
        arrival, kernels = _arrival_of(plan), plan.kernels
        owned_TK = plan.placement.owned_TK
        # The weights must be those with the losses of the router, which the layer has put there.
        x_NH, ids_NK, arrival.weights_NK, counts_E, arrival.handle = self._send(
            all_gather(x_TH, self.groups.tp),
            plan.choices_TK.masked_fill(~owned_TK, -1),
            plan.weights_TK.float().where(owned_TK, 0.0),
            self.moe.num_experts,
            self.groups.ep,
        )
        local, rows = len(counts_E), int(counts_E.sum())
        arrival.placement, arrival.ends_E = place_by_expert(
            ids_NK, local, rows, kernels.rank_in_expert
        )
        return copy_to_rows(x_NH, arrival.placement, kernels.dispatch_tokens)

    def combine(self, rows_RH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
        """Outputs of this rank's experts -> the weighted sums of this rank's tokens, [T, H]."""
        arrival = _arrival_of(plan)
        assert arrival.placement is not None and arrival.weights_NK is not None
        kernel = plan.kernels.combine_tokens
        y_NH = sum_rows(rows_RH, arrival.weights_NK, arrival.placement, kernel)
        y_TH, _ = self._collect(y_NH, self.groups.ep, arrival.handle)
        return reduce_scatter(y_TH, self.groups.tp)


def _arrival_of(plan: Plan) -> FusedArrival:
    assert isinstance(plan.arrival, FusedArrival)
    return plan.arrival


def fused_exchange() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Megatron-Core's dispatch and combine by DeepEP.

    Raises:
        UsageError: there is no CUDA device, or no package `deep_ep`.
    """
    # Imported here: it takes Megatron-Core seconds.
    from megatron.core.transformer.moe import fused_a2a

    if not torch.cuda.is_available():
        raise UsageError(FLAG, "deepep", "alltoall here", "this machine has no CUDA device")
    if fused_a2a.fused_dispatch is None:
        fix = "the package deep_ep (https://github.com/deepseek-ai/DeepEP) is not installed"
        raise UsageError(FLAG, "deepep", "alltoall here", fix)
    return fused_a2a.fused_dispatch, fused_a2a.fused_combine


def place_by_expert(
    ids_NK: Tensor, experts: int, rows: int, kernel: RankInExpert
) -> tuple[Placement, Tensor]:
    """A row for each choice of this rank's experts, sorted by expert, and where each expert ends.

    Example: tokens with experts [1, -1], [0, 1]: the choice of expert 0 has row 0, those of expert
    1 rows 1 and 2. rows_TK is [1, 0], [0, 2], source_R 1 0 1, ends 1 3.

    Args:
        ids_NK: int64 experts of this rank, from 0; -1 for those of other ranks.
        experts: E.
        rows: R, choices that are not -1.
        kernel: of the device.
    """
    tokens, topk = ids_NK.shape
    owned_NK = ids_NK >= 0
    expert_1A = ids_NK.where(owned_NK, experts).view(1, -1)
    rank_1A, load_1X = kernel.forward(expert_1A, experts + 1)
    ends_1X = load_1X.cumsum(1)
    row_NK = ((ends_1X - load_1X).gather(1, expert_1A) + rank_1A).view(tokens, topk)
    token_A = torch.arange(tokens, device=ids_NK.device).repeat_interleave(topk)
    # Choices of other ranks come last, in the spare row past the end.
    source_R = token_A.new_zeros(rows + 1)
    source_R = source_R.scatter_(0, row_NK.clamp(max=rows).view(-1), token_A)[:rows]
    placement = Placement(row_NK * owned_NK, owned_NK, owned_NK, source_R, source_R)
    return placement, ends_1X[0, :experts].int()
