"""Whether tokens that are near each other choose the same experts.

Shapes: L analysed layers, J distances, Q segment lengths, C cache sizes, B rows, S tokens of a row,
E experts, K choices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
SEGMENTS = (4, 16, 64)
"""Tokens of a segment."""
CACHES = (1, 2)
"""Experts of a cache, in multiples of K."""


@collector("locality")
class Locality(Tallies):
    """See the module. Pairs of tokens are of one row and one document.

    Sums:
        pairs_J: pairs of tokens at each distance.
        shared_LJ: experts that both of such a pair choose.
        any_pairs_1, any_shared_L: the same over pairs at any distance, in both orders.
        segment_choices_Q: choices in all segments of a row.
        covered_LQC: those that go to the segment's most chosen experts, as many as the cache has.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        self._caches = [min(c * setting.sizes.topk, self._experts) for c in CACHES]
        layers = len(self._places)
        shapes: dict[str, tuple[int, ...]] = {
            "pairs_J": (len(DISTANCES),),
            "shared_LJ": (layers, len(DISTANCES)),
            "any_pairs_1": (1,),
            "any_shared_L": (layers,),
            "segment_choices_Q": (len(SEGMENTS),),
            "covered_LQC": (layers, len(SEGMENTS), len(CACHES)),
        }
        super().__init__({k: torch.zeros(v, dtype=torch.int64) for k, v in shapes.items()})

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        device = seen.layers[0].ids_TK.device
        sums, topk = self.on(device), seen.layers[0].ids_TK.shape[1]
        documents_BS = torch.from_numpy(np.ascontiguousarray(seen.batch.documents_BS)).to(device)
        rows, length = documents_BS.shape
        same = {
            place: documents_BS[:, distance:] == documents_BS[:, :-distance]
            for place, distance in enumerate(DISTANCES)
            if distance < length
        }
        for place, same_BS in same.items():
            sums["pairs_J"][place] += same_BS.sum()
        part_T, size_X = _parts(documents_BS)
        sums["any_pairs_1"] += (size_X * (size_X - 1)).sum()
        for place, tokens in enumerate(SEGMENTS):
            sums["segment_choices_Q"][place] += rows * (length // tokens) * tokens * topk
        for row, place in enumerate(self._places):
            ids_TK = seen.layers[place].ids_TK
            chosen_BSE = torch.zeros(rows * length, self._experts, device=device)
            chosen_BSE = chosen_BSE.scatter_(1, ids_TK, 1.0).view(rows, length, self._experts)
            self._count_pairs(sums, row, chosen_BSE, same)
            count_XE = torch.zeros(len(size_X), self._experts, dtype=torch.int64, device=device)
            tally(count_XE, part_T[:, None] * self._experts + ids_TK)
            sums["any_shared_L"][row] += (count_XE * (count_XE - 1)).sum()
            self._count_segments(sums, row, chosen_BSE)

    def _count_pairs(
        self, sums: dict[str, Tensor], row: int, chosen_BSE: Tensor, same: dict[int, Tensor]
    ) -> None:
        for place, same_BS in same.items():
            distance = DISTANCES[place]
            shared_BS = (chosen_BSE[:, distance:] * chosen_BSE[:, :-distance]).sum(2)
            sums["shared_LJ"][row, place] += (shared_BS.long() * same_BS).sum()

    def _count_segments(self, sums: dict[str, Tensor], row: int, chosen_BSE: Tensor) -> None:
        rows, length, experts = chosen_BSE.shape
        for place, tokens in enumerate(SEGMENTS):
            whole = length // tokens
            if not whole:
                continue
            parts = chosen_BSE[:, : whole * tokens].view(rows, whole, tokens, experts)
            count_BXE = parts.sum(2)
            best = count_BXE.topk(self._caches[-1], dim=2).values.cumsum(2)
            for cache, size in enumerate(self._caches):
                sums["covered_LQC"][row, place, cache] += best[:, :, size - 1].sum().long()


def _parts(documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the parts of rows that belong to one document: of each token, and their sizes."""
    start_BS = torch.ones_like(documents_BS)
    start_BS[:, 1:] = (documents_BS[:, 1:] != documents_BS[:, :-1]).long()
    part_T = start_BS.reshape(-1).cumsum(0) - 1
    return part_T, part_T.bincount()
