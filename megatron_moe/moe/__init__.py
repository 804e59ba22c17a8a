"""Mixture of experts: router, capacity, dispatch, experts, balance losses, statistics.

Read `layer.py` first: `MoELayer.forward` names the objects in the order in which a token meets
them, `router.py`, `dispatcher.py` (with `plan.py` and `exchange.py`), `experts.py` (with
`expert_gemm.py`), `losses.py`, and `statistics.py` observes.
"""

from megatron_moe.moe.layer import MoELayer, RoutingDecision
from megatron_moe.moe.plan import Capacity, capacity_of
from megatron_moe.moe.statistics import LayerStatistics, collect_statistics, reset_statistics

__all__ = [
    "Capacity",
    "LayerStatistics",
    "MoELayer",
    "RoutingDecision",
    "capacity_of",
    "collect_statistics",
    "reset_statistics",
]
