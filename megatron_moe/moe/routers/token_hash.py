"""A router whose choices are a fixed function of the token's id: no context at all.

The k experts of an id are the first k of an order of the experts that is drawn for the id (random
hashing: Roller et al., Hash Layers, arXiv 2106.04426), the same in every layer. What is learned is
how much a token takes of them: weights are the scores of the experts by the matrix of the router
`linear`. `--no-moe-router-pre-softmax` makes them sum to 1; a softmax over all experts gives each
only about 1 / E. It is the upper bound of context independence, to be held against other routers.

Shapes: T tokens, H hidden, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.moe.mixing import bits_at, mix
from megatron_moe.moe.router import ROUTERS, Router
from megatron_moe.moe.scoring import Scores

KEY = 2106_04426
"""Of the stream that the orders are drawn from."""


@ROUTERS.register("token_hash")
class TokenHashRouter(Router):
    """See the module."""

    def forward(
        self, x_TH: Tensor, batch: int = 1, ids_T: Tensor | None = None
    ) -> tuple[Scores, Tensor]:
        """As `Router.forward`; ``ids_T`` are the ids of these tokens.

        Raises:
            ValueError: without ids.
        """
        if ids_T is None:
            raise ValueError("the router token_hash needs the ids of the tokens")
        scores, x_TH = super().forward(x_TH, batch)
        choices_TK = hashed(ids_T, self.moe.num_experts, self.topk)
        weights_TK = self.weights_of(scores.raw_TE, choices_TK)
        return replace(scores, choices_TK=choices_TK, weights_TK=weights_TK, balance_TK=None), x_TH


def hashed(ids_T: Tensor, num_experts: int, topk: int) -> Tensor:
    """The experts of ids, int64 [T, K]: those with the smallest numbers of the id's own E ones."""
    expert_E = torch.arange(1, num_experts + 1, device=ids_T.device)
    bits_TE = bits_at(ids_T.long().unsqueeze(1) * num_experts + expert_E, mix(KEY))
    return bits_TE.sort(dim=1, stable=True).indices[:, :topk]
