"""Which experts a token chooses, and with what weight.

Logits and softmax in fp32 over all experts, **then** the k largest, whose raw probabilities are the
combine weights: no renormalization, no noise, no bias (released training code of OpenMoE).

The table of tokens and experts is stored with the tokens contiguous, [E, T], and its gradient is
written by hand: a softmax over the first of two dimensions then works on whole vectors of tokens,
and a dozen small operations replace forty. Measured on a CPU with 1024 tokens and 8 experts: the
softmax takes 9 us instead of 90.

Shapes: T tokens, H hidden, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.moe.registry import Registry

ARGMAX_MAX_CHOICES = 2
"""Up to here k passes of argmax are faster than a stable sort; measured on a CPU with T = 4096,
E = 16, k = 2: 0.25 ms against 0.65 ms (`topk`: 0.39 ms, with no fixed order among equals)."""


@dataclass(frozen=True)
class Scores:
    """The router's result for each token.

    Args:
        logits_TE: fp32, without gradient.
        log_probs_TE: fp32 log-softmax, without gradient.
        log_z_T: fp32, logarithm of the softmax normalizer, differentiable.
        probs_TE: fp32, each row sums to 1, differentiable.
        choices_TK: int64 expert ids, best first; among equals the lower id first.
        weights_TK: fp32 probabilities of the choices, differentiable.
    """

    logits_TE: Tensor
    log_probs_TE: Tensor
    log_z_T: Tensor
    probs_TE: Tensor
    choices_TK: Tensor
    weights_TK: Tensor


class Router(nn.Module):
    """The router of one MoE layer.

    Other routers derive from it, override `forward` and register in `ROUTERS`. Losses, statistics
    and the dispatcher read the `Scores` only.

    Args:
        model: hidden size, initial standard deviation.
        moe: number of experts and of choices.
        sequence_parallel: whether ranks hold shards of the sequence.
        params_dtype: dtype of the weight; scores are computed in at least fp32.
        device: where the weight is. It is uninitialized.

    Attributes:
        weight: [E, H], the same on every rank.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        *,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.topk, self.init_std = moe.moe_router_topk, model.router_init_method_std
        shape = (moe.num_experts, model.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        # Megatron-Core sums the gradients of such parameters over tensor-parallel ranks.
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_TH: Tensor) -> tuple[Scores, Tensor]:
        """Score tokens.

        Returns:
            The scores, and the tokens, which the caller uses from here on: the gradient of that use
            and the router's own are then added by one GEMM.
        """
        return route(x_TH, self.weight, self.topk)

    def weights_of(self, probs_TE: Tensor, choices_TK: Tensor) -> Tensor:
        """The combine weights [T, K] of given choices: what `forward` would give them.

        Args:
            probs_TE: probabilities over all experts.
            choices_TK: expert ids.
        """
        return probs_TE.gather(1, choices_TK)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill with the model's standard deviation, for a layer outside of a model."""
        self.weight.normal_(0.0, self.init_std, generator=generator)


ROUTERS: Registry[type[Router]] = Registry("routers", softmax=Router)
"""By the value of `--moe-router-type`."""


def route(x_TH: Tensor, weight_EH: Tensor, topk: int) -> tuple[Scores, Tensor]:
    """`Router.forward` as a function; computes in at least fp32, whatever the dtype of ``x_TH``."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    *scores, x_TH = _Route.apply(x_TH, weight_EH.to(dtype), topk)
    return Scores(*scores), x_TH


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor, topk: int) -> tuple[Tensor, ...]:
        logits_ET = torch.mm(weight_EH, x_TH.to(weight_EH.dtype).t())
        log_probs_ET = logits_ET.log_softmax(0)
        probs_ET = log_probs_ET.exp()
        choices_KT, weights_KT = best_choices(probs_ET, topk)
        # log Z = logit - log p holds for every expert. The best one has the logit closest to log Z:
        # an expert far below would subtract two large numbers and lose the digits of log Z.
        best_1T = choices_KT[:1]
        log_z_T = (logits_ET.gather(0, best_1T) - log_probs_ET.gather(0, best_1T)).squeeze(0)
        ctx.save_for_backward(x_TH, weight_EH, probs_ET, choices_KT)
        ctx.set_materialize_grads(False)
        plain = logits_ET.t(), log_probs_ET.t(), choices_KT.t()
        ctx.mark_non_differentiable(*plain)
        return *plain[:2], log_z_T, probs_ET.t(), plain[2], weights_KT.t(), x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x_TH, weight_EH, probs_ET, choices_KT = ctx.saved_tensors
        _, _, d_log_z_T, d_probs_TE, _, d_weights_TK, d_x_TH = grads
        # With p = softmax(l): dl = p * (dp - sum(dp * p) + dlogZ), as d logZ / dl = p.
        dp_ET = torch.zeros_like(probs_ET) if d_probs_TE is None else d_probs_TE.t()
        if d_weights_TK is not None:
            dp_ET = dp_ET.scatter_add(0, choices_KT, d_weights_TK.t())
        shift_T = (dp_ET * probs_ET).sum(0)
        if d_log_z_T is not None:
            shift_T -= d_log_z_T
        dl_ET = (dp_ET - shift_T).mul_(probs_ET)
        dx_TH = None
        if ctx.needs_input_grad[0]:
            dx_TH = _sum_with_product(d_x_TH, dl_ET.t(), weight_EH, x_TH.dtype)
        d_weight_EH = dl_ET.mm(x_TH.to(dl_ET.dtype)) if ctx.needs_input_grad[1] else None
        return dx_TH, d_weight_EH, None


def _sum_with_product(
    other: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
) -> Tensor:
    """``other`` + ``left`` @ ``right`` in ``dtype``; `None` is zero."""
    if other is not None and left.dtype == dtype:
        return torch.addmm(other, left, right)
    product = left.mm(right).to(dtype)
    return product if other is None else product.add_(other)


def best_choices(probs_ET: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the k largest entries of each column, the best in the first row.

    Among equals the lower id comes first, so that the same token makes the same choice on every
    layout.
    """
    if topk > ARGMAX_MAX_CHOICES:
        ranked = torch.sort(probs_ET, dim=0, descending=True, stable=True)
        return ranked.indices[:topk], ranked.values[:topk]
    # `max` finds the first of the largest, as `argmax` does, in half the time on a CPU.
    found = [torch.max(probs_ET, 0, keepdim=True)]
    while len(found) < topk:
        probs_ET = probs_ET.scatter(0, found[-1].indices, -1.0)
        found.append(torch.max(probs_ET, 0, keepdim=True))
    if topk == 1:
        return found[0].indices, found[0].values
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])
