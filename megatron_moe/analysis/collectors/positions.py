"""Choices and drops by position in the row.

Every position has its own counts unless they would take more than `MOST_BYTES`; then neighbouring
positions share them.

Shapes: L analysed layers, D domains, P positions (buckets), E experts, K choices.
"""

from __future__ import annotations

import torch

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation

MOST_BYTES = 256 << 20
"""Of `chosen_LPE`, which takes 8 L P E bytes."""


def width_of(setting: Setting) -> int:
    """Positions of a bucket."""
    each = 8 * len(setting.layers) * setting.sample.seq_length * setting.sizes.num_experts
    return max(1, -(-each // MOST_BYTES))


@collector("positions")
class Positions(Tallies):
    """See the module.

    Sums:
        tokens_DP: tokens.
        chosen_LPE: choices before drops.
        any_LDP, all_LDP: tokens that lost at least one choice, or all.
        dropped_LDK: dropped choices by rank.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        self._width = width_of(setting)
        buckets = -(-setting.sample.seq_length // self._width)
        layers, domains = len(self._places), len(setting.sample.domains)
        shapes = {
            "tokens_DP": (domains, buckets),
            "chosen_LPE": (layers, buckets, self._experts),
            "any_LDP": (layers, domains, buckets),
            "all_LDP": (layers, domains, buckets),
            "dropped_LDK": (layers, domains, setting.sizes.topk),
        }
        super().__init__({k: torch.zeros(v, dtype=torch.int64) for k, v in shapes.items()})

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        device = seen.layers[0].ids_TK.device
        sums, domain = self.on(device), seen.batch.domain
        rows, length = seen.batch.tokens_BS.shape
        place_T = (torch.arange(length, device=device) // self._width).repeat(rows)
        tally(sums["tokens_DP"][domain], place_T)
        for row, place in enumerate(self._places):
            layer = seen.layers[place]
            tally(sums["chosen_LPE"][row], place_T[:, None] * self._experts + layer.ids_TK)
            dropped_TK = ~layer.kept_TK
            tally(sums["any_LDP"][row, domain], place_T, dropped_TK.any(1))
            tally(sums["all_LDP"][row, domain], place_T, dropped_TK.all(1))
            sums["dropped_LDK"][row, domain] += dropped_TK.sum(0)
