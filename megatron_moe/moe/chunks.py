"""The slots of an expert in chunks, whose exchanges and GEMMs overlap; see `overlap.py`.

A buffer in chunks has all rows of the first chunk, by expert, before those of the second: what is
exchanged together lies together.

Shapes: E experts over all ranks, S rows of one expert from one source (slots of all groups), N
chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotChunks:
    """S rows of each expert in N chunks, as even as can be.

    Args:
        slots: S.
        number: N, at most S.
    """

    slots: int
    number: int

    @property
    def bounds(self) -> list[int]:
        """Chunk j has rows ``bounds[j]`` to ``bounds[j + 1]`` of each expert."""
        return [self.slots * j // self.number for j in range(self.number + 1)]

    def rows(self, row: Tensor, experts: int) -> Tensor:
        """Rows of a buffer in chunks, from those of one by expert (expert * S + slot).

        Example: 2 experts, 3 slots, 2 chunks of 1 and 2 slots: rows 0 1 2 | 3 4 5 of the experts
        become 0 2 3 | 1 4 5. The first chunk is rows 0 and 1, the second has 2 rows of each.

        Args:
            row: int64, any shape.
            experts: E.
        """
        bound = torch.arange(self.number + 1, device=row.device) * self.slots // self.number
        expert, slot = row // self.slots, row % self.slots
        chunk = torch.searchsorted(bound[1:], slot, right=True)
        start = bound[chunk]
        return experts * start + expert * (bound[chunk + 1] - start) + slot - start
