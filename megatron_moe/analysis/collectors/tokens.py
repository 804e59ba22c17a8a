"""Choices by token id: the one that is read, the one that follows, the one that is predicted.

The table has a row for each id that occurs in the sample and one for all others, which the model
may predict. It takes 24 L (V + 1) E bytes (two rules, three kinds, 4 bytes); of a vocabulary that
would exceed `MOST_BYTES`, the most frequent ids have rows.

Shapes: L analysed layers, V ids, E experts, K choices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation

KINDS = ("input", "next", "predicted")
RULES = ("chosen", "first")
"""All K choices of a token, or its first alone."""
MOST_BYTES = 768 << 20


def most_ids(setting: Setting) -> int:
    """Ids that have a row."""
    each = 4 * len(KINDS) * len(RULES) * len(setting.layers) * setting.sizes.num_experts
    return max(1, MOST_BYTES // each - 1)


@collector("tokens")
class Tokens(Tallies):
    """See the module.

    Sums:
        ids_V: the ids, ascending; the tables have one more row, for all others.
        input_V, next_V, predicted_V: occurrences, [V + 1].
        input_chosen_LVE, input_first_LVE, next_chosen_LVE and so on: choices, [L, V + 1, E].
    """

    needs_predictions = True

    def __init__(self, setting: Setting) -> None:
        self._places, self._experts = setting.places(), setting.sizes.num_experts
        ids_V = _ids(setting)
        shape = (len(self._places), len(ids_V) + 1, self._experts)
        sums = {"ids_V": torch.from_numpy(ids_V)}
        for kind in KINDS:
            sums[f"{kind}_V"] = torch.zeros(shape[1], dtype=torch.int64)
            for rule in RULES:
                sums[f"{kind}_{rule}_LVE"] = torch.zeros(shape, dtype=torch.int32)
        super().__init__(sums)
        self._rows = torch.full((setting.sizes.vocab_size,), len(ids_V), dtype=torch.int64)
        self._rows[sums["ids_V"]] = torch.arange(len(ids_V))

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        device = seen.layers[0].ids_TK.device
        sums, self._rows = self.on(device), self._rows.to(device)
        rows = {kind: self._rows[ids_T.to(device)] for kind, ids_T in _read(seen).items()}
        for kind, row_T in rows.items():
            tally(sums[f"{kind}_V"], row_T)
        for row, place in enumerate(self._places):
            ids_TK = seen.layers[place].ids_TK
            for kind, row_T in rows.items():
                index_TK = row_T[:, None] * self._experts + ids_TK
                tally(sums[f"{kind}_chosen_LVE"][row], index_TK)
                tally(sums[f"{kind}_first_LVE"][row], index_TK[:, 0])


def _read(seen: Observation) -> dict[str, Tensor]:
    """Ids [T] of each kind."""
    assert seen.predicted_T is not None, "the pass makes predictions"
    return {
        "input": torch.from_numpy(np.ascontiguousarray(seen.batch.tokens_BS).reshape(-1)),
        "next": torch.from_numpy(np.ascontiguousarray(seen.batch.next_BS).reshape(-1)),
        "predicted": seen.predicted_T,
    }


def _ids(setting: Setting) -> npt.NDArray[np.int64]:
    """The ids of the rows, ascending."""
    found = setting.sample.vocabulary
    most = most_ids(setting)
    if len(found) <= most:
        return found
    count_V = np.zeros(len(found), np.int64)
    for batch in setting.sample.batches():
        each = np.searchsorted(found, batch.tokens_BS.reshape(-1))
        count_V += np.bincount(each, minlength=len(found))
    return np.sort(found[np.argsort(-count_V, kind="stable")[:most]])
