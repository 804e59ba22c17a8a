"""A dispatcher that moves tokens by plain indexing, without kernels."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.moe.dispatcher import DISPATCHERS, TokenDispatcher
from megatron_moe.moe.exchange import all_gather, reduce_scatter
from megatron_moe.moe.plan import Plan


@DISPATCHERS.register("toy")
class Indexing(TokenDispatcher):
    """For any layout: the exchanges between ranks are those of the built-in dispatcher."""

    def dispatch(self, x_TH: Tensor, plan: Plan) -> Tensor:
        """Every row takes its token."""
        x_TH = all_gather(x_TH, self.groups.tp)
        return self.groups.to_experts(x_TH[plan.placement.source_R])

    def combine(self, rows_RH: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
        """Every token sums its rows."""
        rows_RH, placement = self.groups.from_experts(rows_RH), plan.placement
        # A choice without a row on this rank points to row 0, and must add nothing.
        weights_TK1 = (weights_TK * placement.owned_TK).unsqueeze(2)
        y_TH = (rows_RH[placement.rows_TK] * weights_TK1).sum(1)
        return reduce_scatter(y_TH, self.groups.tp)
