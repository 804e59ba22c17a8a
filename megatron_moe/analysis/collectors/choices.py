"""The choices of up to `MOST_TOKENS` tokens, by rank, as they are.

Rows are spread evenly over each domain. Two checkpoints that read the same sample have the choices
of the same tokens, which shows what changed between them; within one checkpoint they are a pool
from which choices that do not depend on the token are drawn.

Shapes: L analysed layers, T stored tokens, K choices; L T K bytes, twice that for > 256 experts.
"""

from __future__ import annotations

import numpy as np

from megatron_moe.analysis.collector import Collector, Setting, collector
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation
from megatron_moe.analysis.sample import first_rows

MOST_TOKENS = 65_536


@collector("choices")
class Choices(Collector):
    """See the module.

    Attributes:
        ids_LTK: chosen experts by decreasing weight, uint8 or uint16.
        tokens_T: the ids that were read.
        domains_T: domains, by their place in the sample.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, self._length = setting.places(), setting.sample.seq_length
        rows_D = [len(domain.starts) for domain in setting.sample.domains]
        self._stride = max(1, -(-sum(rows_D) * self._length // MOST_TOKENS))
        self._first_rows = first_rows(setting.sample)
        stored_D = [-(-rows // self._stride) for rows in rows_D]
        # Row i of a domain, a multiple of the stride, is stored as row `offset + i / stride`.
        self._offset_D = np.cumsum([0, *stored_D[:-1]])
        small = np.uint8 if setting.sizes.num_experts <= 256 else np.uint16
        tokens = sum(stored_D) * self._length
        self.ids_LTK = np.zeros((len(self._places), tokens, setting.sizes.topk), small)
        self.tokens_T = np.zeros(tokens, np.int64)
        self.domains_T = np.zeros(tokens, np.int64)

    def state(self) -> dict[str, np.ndarray]:
        """All arrays, by name."""
        return {k: getattr(self, k) for k in ("ids_LTK", "tokens_T", "domains_T")}

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        batch, length = seen.batch, self._length
        first = self._first_rows[batch.number]
        rows = np.arange(-first % self._stride, len(batch.tokens_BS), self._stride)
        if not len(rows):
            return
        start = (self._offset_D[batch.domain] + (first + rows[0]) // self._stride) * length
        place = slice(start, start + len(rows) * length)
        self.tokens_T[place] = batch.tokens_BS[rows].reshape(-1)
        self.domains_T[place] = batch.domain
        for row, index in enumerate(self._places):
            ids_TK = seen.layers[index].ids_TK
            topk = ids_TK.shape[1]
            ids_BSK = ids_TK.view(-1, length, topk)[rows[0] :: self._stride]
            self.ids_LTK[row, place] = ids_BSK.reshape(-1, topk).cpu().numpy()
