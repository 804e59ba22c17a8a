"""Choices of each expert by domain: all K, the first alone, and those that were kept.

They are also counted by block of neighbouring rows, for intervals and permutation tests that treat
the tokens of a text as dependent.

Shapes: L analysed layers, D domains, E experts, K choices, G blocks of a domain.
"""

from __future__ import annotations

import torch

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation
from megatron_moe.analysis.sample import first_rows

BLOCKS = 64
"""Most blocks of a domain. A block has as many rows in each domain, so that blocks of different
domains can be exchanged; the last one of a domain may have fewer."""


@collector("domains")
class Domains(Tallies):
    """See the module.

    Sums:
        tokens_DG: tokens by block.
        chosen_LDGE, first_LDGE: choices before drops and first choices, by block.
        kept_LDE: choices that found a slot.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        self._rows = [len(domain.starts) for domain in setting.sample.domains]
        self._first_rows = first_rows(setting.sample)
        self._block = -(-max(self._rows) // BLOCKS)
        blocks = -(-max(self._rows) // self._block)
        shape = (len(self._places), len(self._rows), blocks, self._experts)
        sums = {name: torch.zeros(shape, dtype=torch.int64) for name in ("chosen", "first")}
        super().__init__(
            {
                "tokens_DG": torch.zeros(shape[1:3], dtype=torch.int64),
                "chosen_LDGE": sums["chosen"],
                "first_LDGE": sums["first"],
                "kept_LDE": torch.zeros((*shape[:2], self._experts), dtype=torch.int64),
            }
        )

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        device = seen.layers[0].ids_TK.device
        sums = self.on(device)
        domain, (rows, length) = seen.batch.domain, seen.batch.tokens_BS.shape
        row_B = self._first_rows[seen.batch.number] + torch.arange(rows, device=device)
        block_T = (row_B // self._block).repeat_interleave(length)
        tally(sums["tokens_DG"][domain], block_T)
        for row, place in enumerate(self._places):
            layer = seen.layers[place]
            index_TK = block_T[:, None] * self._experts + layer.ids_TK
            tally(sums["chosen_LDGE"][row, domain], index_TK)
            tally(sums["first_LDGE"][row, domain], index_TK[:, 0])
            tally(sums["kept_LDE"][row, domain], layer.ids_TK, layer.kept_TK)
