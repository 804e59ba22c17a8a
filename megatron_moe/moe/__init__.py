"""Mixture of experts: router, capacity, dispatch, experts, balance losses, statistics."""

from megatron_moe.moe.capacity import Capacity, capacity_of
from megatron_moe.moe.layer import MoELayer, Routing
from megatron_moe.moe.statistics import LayerStatistics, collect_statistics, reset_statistics

__all__ = [
    "Capacity",
    "LayerStatistics",
    "MoELayer",
    "Routing",
    "capacity_of",
    "collect_statistics",
    "reset_statistics",
]
