"""A router that also sees what came before a token, so that a token id alone does not decide.

    logits_t = W x_t + V m_t,   m_t = (1 - a) * sum over j < t of a^(t - 1 - j) x_j

m is an exponential moving average of the preceding inputs of the router in the row, with the decay
a of `--moe-router-context-decay`: a = 0.9 forgets half of it in 6.6 tokens. It begins at 0 with the
row and passes the ends of documents within a packed row, also where attention does not: their
weight falls by a with each token. Routers with a recurrent state over tokens: none published with
this form; RMoE (Qiu et al., arXiv 2408.06793) has a recurrence over layers.

V m_t is the average of V x_j, with E numbers a token instead of H. Ranks that share the sequence
gather these, and each averages over the whole row: what a rank sees is what one process sees.

Shapes: T tokens of this rank in (sequence, batch) order, H hidden, E experts, S positions of the
whole row, B rows, N blocks of L positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.moe.exchange import all_gather, rank_of
from megatron_moe.moe.router import ROUTERS, Router
from megatron_moe.moe.scoring import Scores, score

BLOCK = 128
"""Positions that one matrix product averages; blocks are averaged by another one. A choice, not a
measurement: the products cost 2 L and 2 S / L operations a number."""


@ROUTERS.register("contextual")
class ContextualRouter(Router):
    """See the module.

    Attributes:
        context_weight: V, [E, H], the same on every rank.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, **where: Any) -> None:
        super().__init__(model, moe, **where)
        self.context_weight = nn.Parameter(torch.empty_like(self.weight))
        self.context_weight.sequence_parallel = (  # type: ignore[attr-defined]
            self.weight.sequence_parallel  # type: ignore[attr-defined]
        )

    def forward(
        self, x_TH: Tensor, batch: int = 1, ids_T: Tensor | None = None
    ) -> tuple[Scores, Tensor]:
        """As `Router.forward`; computes in at least fp32."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        weights = torch.cat((self.weight, self.context_weight)).to(dtype)
        own_TE, context_TE = (x_TH.to(dtype) @ weights.t()).chunk(2, dim=1)
        whole_SBE = all_gather(context_TE.contiguous(), self.tp_group).unflatten(0, (-1, batch))
        mean_SBE = preceding_mean(whole_SBE, self.moe.moe_router_context_decay)
        local = x_TH.shape[0]
        context_TE = mean_SBE.flatten(0, 1).narrow(0, rank_of(self.tp_group) * local, local)
        return score(own_TE + context_TE, self.rule, self.bias_E), x_TH

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """As `Router.reset_parameters`."""
        super().reset_parameters(generator)
        self.context_weight.normal_(0.0, self.init_std, generator=generator)


def preceding_mean(x_SBE: Tensor, decay: float) -> Tensor:
    """Exponential moving average of the entries before each position; 0 at the first.

    Example, decay 0.5: (4, 2, 8) gives (0, 2, 2): 0.5 * 4, then 0.5 * 2 + 0.5 * 2.
    """
    length, columns = x_SBE.shape[0], x_SBE.shape[1:]
    size = min(BLOCK, length)
    blocks = -(-length // size)
    padded = x_SBE.new_zeros(blocks * size - length, *columns)
    x_NLC = torch.cat((x_SBE, padded)).view(blocks, size, -1) * (1.0 - decay)
    within_NLC = _weights(x_SBE, size, decay) @ x_NLC
    place_L = torch.arange(size, device=x_SBE.device)
    power_L = _power(decay, place_L, x_SBE)
    # What a block leaves to the next one, and what all blocks before it have left.
    ends_NC = torch.einsum("l,nlc->nc", power_L.flip(0), x_NLC)
    before_NC = _weights(x_SBE, blocks, decay**size) @ ends_NC
    mean_NLC = within_NLC + power_L.view(1, -1, 1) * before_NC.unsqueeze(1)
    return mean_NLC.flatten(0, 1)[:length].view_as(x_SBE)


def _weights(like: Tensor, number: int, decay: float) -> Tensor:
    """[i, j]: decay^(i - 1 - j) for j < i, else 0."""
    place = torch.arange(number, device=like.device)
    distance = place.unsqueeze(1) - 1 - place
    return _power(decay, distance.clamp(min=0), like) * (distance >= 0)


def _power(decay: float, exponent: Tensor, like: Tensor) -> Tensor:
    return torch.full_like(exponent, decay, dtype=like.dtype) ** exponent
