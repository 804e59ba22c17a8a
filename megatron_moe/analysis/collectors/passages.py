"""The beginning of each domain, token by token: which experts it uses, with which weight.

Shapes: D domains, L analysed layers, N tokens of a passage, E experts.
"""

from __future__ import annotations

import numpy as np

from megatron_moe.analysis.collector import Collector, Setting, collector
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation

LENGTH = 64
"""Tokens of a passage, at most."""


@collector("passages")
class Passages(Collector):
    """See the module.

    Attributes:
        ids_DN: token ids of the passages.
        weights_DLNE: combine weights of the kept choices; 0 for other experts.
    """

    def __init__(self, setting: Setting) -> None:
        self._places = setting.places()
        domains, length = len(setting.sample.domains), min(LENGTH, setting.sample.seq_length)
        experts = setting.sizes.num_experts
        self.ids_DN = np.full((domains, length), -1, np.int64)
        self.weights_DLNE = np.zeros((domains, len(self._places), length, experts), np.float32)

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        domain, length = seen.batch.domain, self.ids_DN.shape[1]
        if self.ids_DN[domain, 0] >= 0:
            return
        self.ids_DN[domain] = seen.batch.tokens_BS[0, :length]
        for row, place in enumerate(self._places):
            layer = seen.layers[place]
            weights_NK = (layer.weights_TK * layer.kept_TK)[:length]
            made = layer.router_probs_TE.new_zeros(length, self.weights_DLNE.shape[-1])
            made.scatter_(1, layer.ids_TK[:length], weights_NK.to(made.dtype))
            self.weights_DLNE[domain, row] = made.cpu().numpy()
