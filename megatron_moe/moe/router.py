"""Which experts a token chooses, and with what weight: the logits of a router.

`linear` (released training code of OpenMoE): logits x W^T in fp32, without noise. `scoring.py`
makes scores, choices and weights of them: by default a softmax over all experts, **then** the k
largest, whose raw probabilities are the combine weights.

The table of tokens and experts is stored with the tokens contiguous, [E, T], as the kernel wants it
(`fused_kernels/reference/router.py`).

Shapes: T tokens, H hidden, E experts, K choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_kernels.operations import RouterKernel
from fused_kernels.reference import router as reference
from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.moe.exchange import Group
from megatron_moe.moe.expert_bias import ExpertBias
from megatron_moe.moe.registry import Registry, kernels_for
from megatron_moe.moe.scoring import ScoreRule, Scores, score, select


class Router(nn.Module):
    """The router of one MoE layer.

    Other routers derive from it, override `forward` and register in `ROUTERS`. Losses, statistics
    and the dispatcher read the `Scores` only.

    Args:
        model: hidden size, initial standard deviation.
        moe: number of experts and of choices.
        sequence_parallel: whether ranks hold shards of the sequence.
        tp_group: ranks that share the sequence; `None` for one.
        params_dtype: dtype of the weight; scores are computed in at least fp32.
        device: where the weight is. It is uninitialized.

    Attributes:
        weight: [E, H], the same on every rank.
        expert_bias: added to scores for the choices; `None` without.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        *,
        sequence_parallel: bool = False,
        tp_group: Group = None,
        params_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.moe, self.rule, self.tp_group = moe, ScoreRule.of(moe), tp_group
        self.topk, self.init_std = moe.moe_router_topk, model.router_init_method_std
        shape = (self.rows(moe), model.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        # Megatron-Core sums the gradients of such parameters over tensor-parallel ranks.
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.expert_bias = ExpertBias(moe, device) if moe.has_expert_bias else None

    @staticmethod
    def rows(moe: MoEConfig) -> int:
        """Rows of the weight: one for each expert."""
        return moe.num_experts

    @property
    def bias_E(self) -> Tensor | None:
        """Added to scores for the choices; `None` without."""
        return None if self.expert_bias is None else self.expert_bias.weight

    def forward(
        self, x_TH: Tensor, batch: int = 1, ids_T: Tensor | None = None
    ) -> tuple[Scores, Tensor]:
        """Score tokens.

        Args:
            x_TH: this rank's tokens in (sequence, batch) order.
            batch: rows B, for routers that look beyond one token.
            ids_T: of these tokens, for `token_hash`; `None` with other routers.

        Returns:
            The scores, and the tokens, which the caller uses from here on: the gradient of that use
            and the router's own are then added by one GEMM.
        """
        if self.rule.function == "sigmoid":
            # At least fp32: in bf16 many experts would be equal.
            dtype = torch.promote_types(x_TH.dtype, torch.float32)
            logits_TE = x_TH.to(dtype) @ self.weight.to(dtype).t()
            return score(logits_TE, self.rule, self.bias_E), x_TH
        kernel = kernels_for(self.moe, x_TH.device.type).router
        scores, x_TH = route(x_TH, self.weight, self.topk, kernel)
        return select(scores, self.rule, self.bias_E), x_TH

    def weights_of(self, scores_TE: Tensor, choices_TK: Tensor) -> Tensor:
        """The combine weights [T, K] of given choices: what `forward` would give them.

        Args:
            scores_TE: of all experts, `Scores.raw_TE`.
            choices_TK: expert ids.
        """
        return self.rule.weights(scores_TE.gather(1, choices_TK))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill with the model's standard deviation, for a layer outside of a model."""
        self.weight.normal_(0.0, self.init_std, generator=generator)
        if self.expert_bias is not None:
            self.expert_bias.weight.zero_()


ROUTERS: Registry[type[Router]] = Registry("routers", linear=Router)
"""By the value of `--moe-router-type`."""


def route(
    x_TH: Tensor, weight_EH: Tensor, topk: int, kernel: RouterKernel = reference
) -> tuple[Scores, Tensor]:
    """`Router.forward` as a function; computes in at least fp32, whatever the dtype of ``x_TH``."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    *scores, x_TH = _Route.apply(x_TH, weight_EH.to(dtype), topk, kernel)
    return Scores(*scores), x_TH


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_EH: Tensor, topk: int, kernel: RouterKernel
    ) -> tuple[Tensor, ...]:
        logits_ET = torch.mm(weight_EH, x_TH.to(weight_EH.dtype).t())
        log_probs_ET, probs_ET, log_z_T, choices_KT, weights_KT = kernel.forward(logits_ET, topk)
        ctx.save_for_backward(x_TH, weight_EH, probs_ET, choices_KT)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        plain = logits_ET.t(), log_probs_ET.t(), choices_KT.t()
        ctx.mark_non_differentiable(*plain)
        return *plain[:2], log_z_T, probs_ET.t(), plain[2], weights_KT.t(), x_TH.view_as(x_TH)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TH, weight_EH, probs_ET, choices_KT = ctx.saved_tensors
        _, _, d_log_z_T, d_probs_TE, _, d_weights_TK, d_x_TH = grads
        d_probs_ET = None if d_probs_TE is None else d_probs_TE.t()
        d_weights_KT = None if d_weights_TK is None else d_weights_TK.t()
        dl_ET = ctx.kernel.backward(d_log_z_T, d_probs_ET, d_weights_KT, probs_ET, choices_KT)
        dx_TH = None
        if ctx.needs_input_grad[0]:
            dx_TH = _sum_with_product(d_x_TH, dl_ET.t(), weight_EH, x_TH.dtype)
        d_weight_EH = dl_ET.mm(x_TH.to(dl_ET.dtype)) if ctx.needs_input_grad[1] else None
        return dx_TH, d_weight_EH, None, None


def _sum_with_product(
    other: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
) -> Tensor:
    """``other`` + ``left`` @ ``right`` in ``dtype``; `None` is zero."""
    if other is not None and left.dtype == dtype:
        return torch.addmm(other, left, right)
    product = left.mm(right).to(dtype)
    return product if other is None else product.add_(other)
