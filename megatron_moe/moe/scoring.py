"""From a router's logits to scores, choices and combine weights.

    score    softmax over all experts (OpenMoE), or the sigmoid of each logit by itself
    ranking  score, plus the bias of the expert if there is one; of experts in the best groups alone
    choices  the k largest in the ranking
    weights  the scores of the choices; divided by their sum without `--moe-router-pre-softmax`, and
             with sigmoid where k > 1; times `--moe-router-topk-scaling-factor`

Megatron-LM's meaning (`topk_routing_with_score_function`, core 0.16.1), where a softmax over the k
chosen logits is a softmax over all of them divided by the sum of the chosen ones: exp(l_i) / Z
divided by sum_j exp(l_j) / Z. Two consequences of its code are kept:

- Without `--moe-router-pre-softmax` groups of experts are compared by logits, otherwise by scores.
- The balance loss is of the router's own preference: of the k largest scores, without bias and
  groups. Sigmoid scores enter it divided by their sum over all experts, since a router would
  otherwise lower the loss by lowering all of its scores.

Example: logits (0, ln 3, -ln 3, ln 2) and k = 2 choose experts 1 and 3. Softmax: scores 9/19 and
6/19, the weights with `--moe-router-pre-softmax`; 3/5 and 2/5 without. Sigmoid: scores 3/4 and 2/3,
weights 9/17 and 8/17.

Shapes: T tokens, E experts, K choices, G groups of E / G consecutive experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.config import MoEConfig

LEAST_SUM = 1e-20
"""Added to the sum that scores are divided by, as in Megatron-LM: sigmoids may all be 0."""


@dataclass(frozen=True)
class Scores:
    """The router's result for each token.

    Args:
        logits_TE: at least fp32, without gradient.
        log_probs_TE: logarithms of `probs_TE`, without gradient.
        log_z_T: logarithm of the sum of exp(logit), differentiable: what the z-loss reads. Over all
            experts, or over the chosen ones with `--moe-z-loss-over chosen`.
        probs_TE: each row sums to 1, differentiable: what the balance loss reads.
        choices_TK: int64 expert ids, best first; among equals the lower id first.
        weights_TK: combine weights of the choices, differentiable.
        scores_TE: what weights are made of, differentiable; `None` if it is ``probs_TE``.
        balance_TK: int64 choices that the balance loss counts; `None` if they are the choices.
    """

    logits_TE: Tensor
    log_probs_TE: Tensor
    log_z_T: Tensor
    probs_TE: Tensor
    choices_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor | None = None
    balance_TK: Tensor | None = None

    @property
    def raw_TE(self) -> Tensor:
        """`scores_TE`, or `probs_TE` in its place."""
        return self.probs_TE if self.scores_TE is None else self.scores_TE


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """How logits become choices and weights.

    Args:
        function: `softmax` over all experts or `sigmoid` of each.
        topk: K.
        normalised: whether the weights of a token are divided by their sum.
        scale: factor of the weights; `None` for 1.
        groups: G; 1 without groups.
        group_topk: groups among whose experts a token chooses.
        groups_by_logits: whether groups are compared by their logits rather than their scores.
        z_of_chosen: whether the z-loss is of the chosen experts alone.
    """

    function: Literal["softmax", "sigmoid"] = "softmax"
    topk: int
    normalised: bool = False
    scale: float | None = None
    groups: int = 1
    group_topk: int = 1
    groups_by_logits: bool = False
    z_of_chosen: bool = False

    @classmethod
    def of(cls, moe: MoEConfig) -> ScoreRule:
        """The rule of a configuration."""
        sigmoid = moe.moe_router_score_function == "sigmoid"
        after = not sigmoid and not moe.moe_router_pre_softmax
        return cls(
            function=moe.moe_router_score_function,
            topk=moe.moe_router_topk,
            normalised=moe.moe_router_topk > 1 if sigmoid else after,
            scale=moe.moe_router_topk_scaling_factor,
            groups=moe.moe_router_num_groups or 1,
            group_topk=moe.moe_router_group_topk or 1,
            groups_by_logits=after,
            z_of_chosen=moe.moe_z_loss_over == "chosen",
        )

    def weights(self, scores_TK: Tensor) -> Tensor:
        """Combine weights of choices from their scores, [T, K]."""
        if self.normalised:
            scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + LEAST_SUM)
        return scores_TK if self.scale is None else scores_TK * self.scale


def score(logits_TE: Tensor, rule: ScoreRule, bias_E: Tensor | None = None) -> Scores:
    """Scores, choices and weights of differentiable logits, by automatic differentiation.

    Args:
        logits_TE: at least fp32.
        rule: see there.
        bias_E: added to the scores for the selection; `None` without.
    """
    if rule.function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        probs_TE = scores_TE / (scores_TE.sum(dim=1, keepdim=True) + LEAST_SUM)
        least = torch.finfo(probs_TE.dtype).tiny
        log_probs_TE = probs_TE.detach().clamp(min=least).log()
    else:
        differentiable_TE = logits_TE.log_softmax(1)
        probs_TE = scores_TE = differentiable_TE.exp()
        log_probs_TE = differentiable_TE.detach()
    choices_TK = best(scores_TE.detach(), rule.topk)
    scores = Scores(
        logits_TE=logits_TE.detach(),
        log_probs_TE=log_probs_TE,
        log_z_T=logits_TE.logsumexp(1),
        probs_TE=probs_TE,
        choices_TK=choices_TK,
        weights_TK=scores_TE.gather(1, choices_TK),
        scores_TE=None if rule.function == "softmax" else scores_TE,
    )
    scores = select(scores, rule, bias_E)
    if rule.z_of_chosen and rule.function == "sigmoid":
        chosen_TK = logits_TE.gather(1, scores.choices_TK)
        scores = replace(scores, log_z_T=chosen_TK.logsumexp(1))
    return scores


def select(scores: Scores, rule: ScoreRule, bias_E: Tensor | None = None) -> Scores:
    """The scores with the choices and weights of a rule.

    Args:
        scores: with the k largest scores as choices, and these scores as weights.
        rule: see `ScoreRule`.
        bias_E: added to the scores for the selection; `None` without.
    """
    if bias_E is None and rule.groups == 1:
        return _weighted(scores, rule, scores.weights_TK)
    raw_TE = scores.raw_TE
    ranking_TE = raw_TE.detach()
    if rule.groups_by_logits and bias_E is None:
        ranking_TE = scores.logits_TE
    if bias_E is not None:
        ranking_TE = ranking_TE + bias_E
    if rule.groups > 1:
        ranking_TE = limited(ranking_TE, rule)
    choices_TK = best(ranking_TE, rule.topk)
    scores = replace(scores, choices_TK=choices_TK, balance_TK=scores.choices_TK)
    return _weighted(scores, rule, raw_TE.gather(1, choices_TK))


def _weighted(scores: Scores, rule: ScoreRule, chosen_TK: Tensor) -> Scores:
    """With the weights that the scores of the choices give, and the z-loss of these choices."""
    log_z_T = scores.log_z_T
    if rule.z_of_chosen and rule.function == "softmax":
        # Of a softmax, log sum over the chosen of exp(l) = log Z + log sum over the chosen of p.
        share_T = chosen_TK.sum(1).clamp(min=torch.finfo(chosen_TK.dtype).tiny)
        log_z_T = log_z_T + share_T.log()
    return replace(scores, weights_TK=rule.weights(chosen_TK), log_z_T=log_z_T)


def limited(ranking_TE: Tensor, rule: ScoreRule) -> Tensor:
    """The ranking with -inf outside of each token's best groups.

    A group is as good as the sum of its best K // `group_topk` experts (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2; with as many groups as expert-parallel ranks, the device-limited
    routing of DeepSeek-V2, arXiv 2405.04434, section 2.2.2). Among equals the lower group wins.

    Example: 4 experts in 2 groups with (5, 0 | 3, 3), K = 2 from one group: 5 + 0 loses to 3 + 3,
    and the token chooses experts 2 and 3.
    """
    ranking_TGE = ranking_TE.unflatten(1, (rule.groups, -1))
    worth_TG = ranking_TGE.topk(rule.topk // rule.group_topk, dim=2).values.sum(2)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    kept_TG.scatter_(1, best(worth_TG, rule.group_topk), True)
    return ranking_TGE.masked_fill(~kept_TG.unsqueeze(2), -torch.inf).flatten(1)


def best(ranking_TE: Tensor, topk: int) -> Tensor:
    """Ids of the k largest of each row, [T, K], the best first; among equals the lower id first."""
    return ranking_TE.sort(dim=1, descending=True, stable=True).indices[:, :topk]
