"""A router with sigmoid scores: each expert is scored alone, scores are divided by their sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_moe.moe.router import ROUTERS, Router
from megatron_moe.moe.scoring import Scores


@ROUTERS.register("toy")
class SigmoidRouter(Router):
    """p_e = sigmoid(logit_e) / sum over all experts, then the k largest."""

    def forward(
        self, x_TH: Tensor, batch: int = 1, ids_T: Tensor | None = None
    ) -> tuple[Scores, Tensor]:
        """As `Router.forward`, with gradients by automatic differentiation.

        Every token is scored by its content alone. A rank holds a shard of the sequence under
        sequence parallelism, so a token's index on its rank depends on the layout.
        """
        # At least fp32: in bf16 many experts would be equal, and the softmax would lose digits.
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        logits_TE = x_TH.to(dtype) @ self.weight.to(dtype).t()
        # The softmax of log sigmoid(l) is sigmoid(l) divided by the sum, without dividing 0 by 0
        # where all logits are far below 0.
        log_probs_TE = logsigmoid(logits_TE).log_softmax(-1)
        probs_TE = log_probs_TE.exp()
        # A stable sort puts the lower expert first among equals, as `Scores` requires.
        ranked_TE = probs_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        choices_TK = ranked_TE[:, : self.topk]
        scores = Scores(
            logits_TE=logits_TE.detach(),
            log_probs_TE=log_probs_TE.detach(),
            log_z_T=logits_TE.logsumexp(-1),
            probs_TE=probs_TE,
            choices_TK=choices_TK,
            weights_TK=probs_TE.gather(1, choices_TK),
        )
        return scores, x_TH
