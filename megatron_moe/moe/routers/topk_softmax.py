"""The router of Megatron-LM without `--moe-router-pre-softmax`: top-k first, then a softmax.

The k largest logits are the choices, and their weights are a softmax over these k alone, so that
the weights of a token sum to 1. A softmax over all experts whose k chosen probabilities are divided
by their sum is the same function: exp(l_i) / Z divided by sum_j exp(l_j) / Z. Losses and statistics
read the probabilities over all experts, as Megatron-LM's auxiliary losses do.

Example: logits (0, ln 3, -ln 3, ln 2) and k = 2 choose experts 1 and 3 with weights 3/5 and 2/5.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_moe.moe.router import ROUTERS, Router, Scores


@ROUTERS.register("topk_softmax")
class TopkSoftmaxRouter(Router):
    """See the module. With k = 1 every weight would be 1, whatever the logits: use `softmax`."""

    def forward(self, x_TH: Tensor) -> tuple[Scores, Tensor]:
        """As `Router.forward`; the weights of each token sum to 1."""
        scores, x_TH = super().forward(x_TH)
        # The best of E probabilities is at least 1 / E, so the sum is never 0.
        weights_TK = scores.weights_TK / scores.weights_TK.sum(dim=1, keepdim=True)
        return replace(scores, weights_TK=weights_TK), x_TH

    def weights_of(self, probs_TE: Tensor, choices_TK: Tensor) -> Tensor:
        """As `Router.weights_of`; they sum to 1."""
        weights_TK = super().weights_of(probs_TE, choices_TK)
        return weights_TK / weights_TK.sum(dim=1, keepdim=True)
