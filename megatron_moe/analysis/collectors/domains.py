"""Choices of each expert by domain: all K, the first alone, and those that were kept.

Shapes: L analysed layers, D domains, E experts, K choices.
"""

from __future__ import annotations

import numpy as np

from megatron_moe.analysis.collector import Collector, Setting, collector
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation


@collector("domains")
class Domains(Collector):
    """See the module.

    Attributes:
        tokens_D: tokens.
        chosen_LDE: choices before drops.
        first_LDE: first choices.
        kept_LDE: choices that found a slot.
    """

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places()
        domains, experts = len(setting.sample.domains), setting.sizes.num_experts
        shape = (len(self._places), domains, experts)
        self.tokens_D = np.zeros(domains, np.int64)
        self.chosen_LDE = np.zeros(shape, np.int64)
        self.first_LDE = np.zeros(shape, np.int64)
        self.kept_LDE = np.zeros(shape, np.int64)

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        domain, experts = seen.batch.domain, self.chosen_LDE.shape[2]
        self.tokens_D[domain] += seen.batch.size
        for row, place in enumerate(self._places):
            layer = seen.layers[place]
            self.chosen_LDE[row, domain] += layer.counts_E.cpu().numpy()
            first = layer.ids_TK[:, 0].bincount(minlength=experts)
            self.first_LDE[row, domain] += first.cpu().numpy()
            kept = layer.ids_TK[layer.kept_TK].bincount(minlength=experts)
            self.kept_LDE[row, domain] += kept.cpu().numpy()
