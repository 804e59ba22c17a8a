"""A dispatcher that moves tokens by plain indexing."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.moe.dispatcher import DISPATCHERS, TokenDispatcher
from megatron_moe.moe.plan import Plan


@DISPATCHERS.register("toy")
class Indexing(TokenDispatcher):
    """Without kernels, for one tensor-parallel rank."""

    def dispatch(self, x_TH: Tensor, plan: Plan) -> Tensor:
        """Every row takes its token."""
        return self.groups.to_experts(x_TH[plan.placement.source_R])

    def combine(self, rows_RH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
        """Every token takes its rows."""
        rows_RH, placement = self.groups.from_experts(rows_RH), plan.placement
        weights_TK1 = (weights_TK * placement.owned_TK).unsqueeze(2)
        return (rows_RH[placement.rows_TK] * weights_TK1).sum(1)
