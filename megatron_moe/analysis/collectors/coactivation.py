"""How often two experts are chosen for the same token.

Shapes: L analysed layers, E experts, T tokens of a batch, K choices.
"""

from __future__ import annotations

import torch

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation


@collector("coactivation")
class Coactivation(Tallies):
    """See the module.

    Sums:
        pairs_LEE: tokens that choose both experts; on the diagonal, those that choose the one.
        adjacent_LEE: tokens whose choices of two consecutive ranks are (row, column).
        tokens_1: tokens.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        shape = (len(self._places), self._experts, self._experts)
        names = ("pairs_LEE", "adjacent_LEE")
        sums = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
        super().__init__({**sums, "tokens_1": torch.zeros(1, dtype=torch.int64)})

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        sums = self.on(seen.layers[0].ids_TK.device)
        sums["tokens_1"] += seen.batch.size
        for row, place in enumerate(self._places):
            ids_TK = seen.layers[place].ids_TK
            chosen_TE = torch.zeros(len(ids_TK), self._experts, device=ids_TK.device)
            chosen_TE.scatter_(1, ids_TK, 1.0)
            # Sums of ones are exact in fp32 up to 2^24, more tokens than a batch has.
            sums["pairs_LEE"][row] += (chosen_TE.T @ chosen_TE).long()
            tally(sums["adjacent_LEE"][row], ids_TK[:, :-1] * self._experts + ids_TK[:, 1:])
