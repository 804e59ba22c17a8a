"""A router whose scores are norms: a proxy of how strongly each expert would respond to a token.

    logit_e = || A_e x ||_2,   A_e of `--moe-router-norm-rank` rows

Autonomy-of-Experts (Lv et al., arXiv 2501.13074) ranks experts by the norm of x W_down, the first
factor of their low-rank gate, which every expert computes for every token. Here the factors belong
to the router alone and experts stay as they are, so that A_e is a proxy that is trained by the
weights of the choices, and every layout, expert implementation and checkpoint works with it.

Logits are not negative; a token of zeros has the same one for all experts.

Shapes: T tokens, H hidden, E experts, R rows of a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.moe.router import ROUTERS, Router
from megatron_moe.moe.scoring import Scores, score

EPSILON = 1e-6
"""Added to squared norms: the gradient of a norm does not exist at 0."""


@ROUTERS.register("norm")
class NormRouter(Router):
    """See the module. Its weight is [E * R, H], the factors of all experts in their order."""

    @staticmethod
    def rows(moe: MoEConfig) -> int:
        """As `Router.rows`: R for each expert."""
        return moe.router_rows

    def forward(
        self, x_TH: Tensor, batch: int = 1, ids_T: Tensor | None = None
    ) -> tuple[Scores, Tensor]:
        """As `Router.forward`; computes in at least fp32."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        factors_TER = (x_TH.to(dtype) @ self.weight.to(dtype).t()).unflatten(
            1, (self.moe.num_experts, -1)
        )
        logits_TE = (factors_TER.square().sum(2) + EPSILON).sqrt()
        return score(logits_TE, self.rule, self.bias_E), x_TH
