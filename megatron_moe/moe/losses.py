"""The two losses of a router, and how they join the backward pass.

Load balance: E * sum_e f_e P_e over a row (or the micro-batch), f_e the choices of expert e per
token, before drops, and P_e its mean probability: k when balanced (Switch Transformer, eq. 4, with
k choices). Router z-loss: mean of logsumexp(logits)^2 (ST-MoE, eq. 5).

With sequence parallelism each rank has a shard of every row. f comes from the gathered choices; the
loss is linear in P, so a rank's share of it is its own tokens' share, and shares add up.
Shapes: T tokens of this rank, E experts, B rows, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.moe.router import Scores


def load_per_row(choices_TK: Tensor, batch: int, num_experts: int) -> Tensor:
    """Choices per row and expert, [B, E] fp32, of tokens in (sequence, batch) order."""
    choices_BA = choices_TK.view(-1, batch, choices_TK.shape[1]).transpose(0, 1).reshape(batch, -1)
    load_BE = torch.zeros(batch, num_experts, device=choices_TK.device)
    return load_BE.scatter_add_(1, choices_BA, torch.ones_like(choices_BA, dtype=torch.float32))


def load_balancing_loss(probs_TE: Tensor, load_BE: Tensor, tokens: int, per_row: bool) -> Tensor:
    """This rank's share of the load-balancing loss.

    Args:
        probs_TE: probabilities of this rank's tokens.
        load_BE: choices over all ranks that share the rows.
        tokens: tokens of the micro-batch over these ranks.
        per_row: mean over rows of the loss of each, or one loss over the micro-batch.
    """
    rows, experts = load_BE.shape
    if per_row:
        mass_BE = probs_TE.view(-1, rows, experts).sum(0)
        # E * sum_e (load / S) (mass / S) averaged over B rows, where S = tokens / B.
        return (mass_BE * load_BE).sum() * (experts * rows / tokens**2)
    return (probs_TE.sum(0) * load_BE.sum(0)).sum() * (experts / tokens**2)


def router_z_loss(scores: Scores, tokens: int) -> Tensor:
    """This rank's share of the mean over ``tokens`` tokens."""
    return scores.log_z_T.square().sum() / tokens


def attach(weights_TK: Tensor, loss: Tensor) -> Tensor:
    """Let ``loss`` take part in the backward pass of whatever is made from ``weights_TK``.

    The engine's schedule sets the scale of such losses to that of the main loss of a micro-batch.
    """
    # Imported here: Megatron-Core takes seconds to import and a forward pass does not need it.
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    return MoEAuxLossAutoScaler.apply(weights_TK, loss)
