"""How a router chooses and weights experts, computed from its logits.

`transformers` computes the choices of a model; this computes them again, to check what it returns
and to route without some experts.

Shapes: T tokens, E experts, K choices, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a router selects and weights experts.

    Args:
        topk: K.
        score: function from logits to scores; softmax is over all experts.
        normalised: whether the scores of the chosen experts are divided by their sum.
        scale: final factor of the weights.
        groups: number of equal groups of consecutive experts.
        kept_groups: only experts of this many best groups can be chosen.
        group_score: score of a group: that of its best expert, or the sum of its best two.
        biased: a learned bias is added to the scores for the selection, not for the weights.
    """

    topk: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["best", "best two"] = "best"
    biased: bool = False


def scores_of(rule: RoutingRule, logits_TE: Tensor) -> Tensor:
    """Scores of all experts, [T, E] in fp32."""
    logits_TE = logits_TE.float()
    return logits_TE.softmax(-1) if rule.score == "softmax" else logits_TE.sigmoid()


def ranking_of(rule: RoutingRule, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """What the choice maximises, [T, E]: score plus bias, -inf outside the best groups."""
    ranking_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if rule.groups == 1:
        return ranking_TE
    ranking_TGE = ranking_TE.unflatten(-1, (rule.groups, -1))
    count = 1 if rule.group_score == "best" else 2
    worth_TG = ranking_TGE.topk(min(count, ranking_TGE.shape[-1]), dim=-1).values.sum(-1)
    best_TG = worth_TG.topk(rule.kept_groups, dim=-1).indices
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, True)
    return ranking_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def choose(
    rule: RoutingRule,
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    excluded_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chosen experts and their combine weights, [T, K] each, best first.

    An excluded expert is routed as if its logit were -inf: its score is 0, a softmax gives its
    share to the others, and it is not chosen whatever its bias. Where fewer than K experts remain
    in the groups that can be chosen, the weight of the rest is 0.

    Args:
        rule: see there.
        logits_TE: of the router.
        bias_E: for the selection; `None` without.
        excluded_E: true for experts that cannot be chosen; `None` for none.
    """
    if excluded_E is not None:
        logits_TE = logits_TE.float().masked_fill(excluded_E, -torch.inf)
        bias_E = None if bias_E is None else bias_E.float().masked_fill(excluded_E, 0.0)
    scores_TE = scores_of(rule, logits_TE)
    ranking_TE = ranking_of(rule, scores_TE, bias_E)
    if excluded_E is not None:
        ranking_TE = ranking_TE.masked_fill(excluded_E, -torch.inf)
    ids_TK = ranking_TE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.topk]
    weights_TK = scores_TE.gather(1, ids_TK)
    if excluded_E is not None:
        weights_TK = weights_TK * ranking_TE.gather(1, ids_TK).isfinite()
    return ids_TK, combined(rule, weights_TK)


def combined(rule: RoutingRule, scores_TK: Tensor) -> Tensor:
    """Combine weights of chosen experts from their scores, [T, K]."""
    if rule.normalised:
        scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
    return scores_TK * rule.scale
