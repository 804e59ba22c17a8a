"""Choices in one analysed layer and the next one, of the same token.

Shapes: M pairs of consecutive analysed layers, E experts, K choices.
"""

from __future__ import annotations

import torch

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation


@collector("flow")
class Flow(Tallies):
    """See the module.

    Sums:
        first_MEE: tokens by first choice in the one layer and in the next.
        all_MEE: pairs of any choice in the one and any in the next, K^2 for each token.
        slots_MEE: pairs of choices of the same rank, K for each token.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        shape = (len(self._places) - 1, self._experts, self._experts)
        names = ("first_MEE", "all_MEE", "slots_MEE")
        super().__init__({name: torch.zeros(shape, dtype=torch.int64) for name in names})

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        sums = self.on(seen.layers[0].ids_TK.device)
        for row, (one, next_) in enumerate(zip(self._places, self._places[1:], strict=False)):
            from_TK = seen.layers[one].ids_TK * self._experts
            to_TK = seen.layers[next_].ids_TK
            tally(sums["first_MEE"][row], (from_TK + to_TK)[:, 0])
            tally(sums["slots_MEE"][row], from_TK + to_TK)
            tally(sums["all_MEE"][row], from_TK[:, :, None] + to_TK[:, None, :])
