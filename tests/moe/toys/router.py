"""A router by position: token t chooses experts t, t + 1, ... modulo E."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.moe.router import ROUTERS, Router, Scores


@ROUTERS.register("toy")
class RoundRobin(Router):
    """Scores are those of `Router`; choices do not depend on them."""

    def forward(self, x_TH: Tensor) -> tuple[Scores, Tensor]:
        """As `Router.forward`, with gradients by automatic differentiation."""
        logits_TE = x_TH @ self.weight.t()
        probs_TE = logits_TE.softmax(-1)
        first_T = torch.arange(x_TH.shape[0], device=x_TH.device)
        step_K = torch.arange(self.topk, device=x_TH.device)
        choices_TK = (first_T.unsqueeze(1) + step_K) % self.weight.shape[0]
        scores = Scores(
            logits_TE=logits_TE.detach(),
            log_probs_TE=logits_TE.detach().log_softmax(-1),
            log_z_T=logits_TE.logsumexp(-1),
            probs_TE=probs_TE,
            choices_TK=choices_TK,
            weights_TK=probs_TE.gather(1, choices_TK),
        )
        return scores, x_TH
