"""Load and confidence of the router.

Shapes: L analysed layers, E experts, K choices, T tokens of a batch.
"""

from __future__ import annotations

import torch

from megatron_moe.analysis.collector import Setting, Tallies, collector, tally
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation


@collector("load")
class Load(Tallies):
    """See the module. Scores are divided by their sum over the experts where they are sigmoids.

    Sums:
        tokens_1: tokens.
        chosen_LE, first_LE, kept_LE: choices before drops, first ones, those that found a slot.
        score_LE: scores over their sum, fp64, which is 1 for a softmax.
        confidence_L: scores of the first choice, fp64.
        mass_L: scores of all K choices, fp64.
        entropy_L: entropies of the scores in nats, fp64.
    """

    def __init__(self, setting: Setting) -> None:
        self._places, layers = setting.places(), len(setting.layers)
        shape = (layers, setting.sizes.num_experts)
        sums = {k: torch.zeros(shape, dtype=torch.int64) for k in ("chosen", "first", "kept")}
        means = ("confidence_L", "mass_L", "entropy_L")
        super().__init__(
            {
                "tokens_1": torch.zeros(1, dtype=torch.int64),
                **{f"{name}_LE": value for name, value in sums.items()},
                "score_LE": torch.zeros(shape, dtype=torch.float64),
                **{name: torch.zeros(layers, dtype=torch.float64) for name in means},
            }
        )

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        sums = self.on(seen.layers[0].ids_TK.device)
        sums["tokens_1"] += seen.batch.size
        for row, place in enumerate(self._places):
            layer = seen.layers[place]
            tally(sums["chosen_LE"][row], layer.ids_TK)
            tally(sums["first_LE"][row], layer.ids_TK[:, 0])
            tally(sums["kept_LE"][row], layer.ids_TK, layer.kept_TK)
            total_T1 = layer.router_probs_TE.sum(1, keepdim=True)
            scores_TE = layer.router_probs_TE / total_T1
            chosen_TK = layer.probs_TK / total_T1
            sums["score_LE"][row] += scores_TE.sum(0, dtype=torch.float64)
            sums["confidence_L"][row] += chosen_TK[:, 0].sum(dtype=torch.float64)
            sums["mass_L"][row] += chosen_TK.sum(dtype=torch.float64)
            sums["entropy_L"][row] += torch.special.entr(scores_TE).sum(dtype=torch.float64)
