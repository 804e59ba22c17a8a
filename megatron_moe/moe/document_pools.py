"""Routing within a pool of experts for each document (EMO, arXiv 2605.06663).

    pool of a document     the P experts with the largest sums of scores over its tokens
    scores of its tokens   those of a router that has the experts of the pool alone

so that tokens of a document share experts and experts come to serve kinds of documents. In training
alone: a pool depends on the whole document, later tokens included. Evaluation and generation take
all experts, as EMO's full model does. P is drawn between two bounds, so that the model works with
pools of many sizes; EMO draws it for each document, here it is drawn for the n-th documents of all
rows in a step and layer, alike on every layout and under recomputation. A row without separate
documents is one.

Losses and statistics read the scores within the pool. A loss over rows would work against pools:
use `global_aux_loss`, as EMO does.

Shapes: T tokens of this rank in (sequence, batch) order, E experts, B rows, D documents of all
rows, of which a row has at most as many as positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dropping import Draw
from megatron_moe.moe.exchange import Group, size_of
from megatron_moe.moe.mixing import mix, uniform_bits
from megatron_moe.moe.scoring import LEAST_SUM, ScoreRule, Scores, best

KEY = 2605_06663
"""Sets this stream of numbers apart from those of drop policies."""


def restricted(
    scores: Scores,
    rule: ScoreRule,
    documents_T: Tensor,
    *,
    rows: int,
    sizes: tuple[int, int],
    draw: Draw,
    bias_E: Tensor | None = None,
    tp_group: Group = None,
) -> Scores:
    """The scores of a router that has the experts of each document's pool alone.

    Args:
        scores: of all experts.
        rule: of the weights.
        documents_T: int64 number of each token's document within its row.
        rows: B.
        sizes: least and largest P.
        draw: layer, seed and step.
        bias_E: added to scores for the choices; `None` without.
        tp_group: ranks that share the rows.
    """
    places = documents_T.shape[0] // rows * size_of(tp_group)
    row_T = torch.arange(rows, device=documents_T.device).repeat(documents_T.shape[0] // rows)
    document_T = row_T * places + documents_T
    raw_TE = scores.raw_TE
    sums_DE = raw_TE.new_zeros(rows * places, raw_TE.shape[1])
    sums_DE.index_add_(0, document_T, raw_TE.detach())
    if size_of(tp_group) > 1:
        dist.all_reduce(sums_DE, group=tp_group)
    size_D = pool_sizes(places, sizes, draw, documents_T.device).repeat(rows)
    order_DE = best(sums_DE, sums_DE.shape[1])
    rank_E = torch.arange(order_DE.shape[1], device=order_DE.device)
    in_pool_DE = torch.zeros_like(sums_DE, dtype=torch.bool)
    in_pool_DE.scatter_(1, order_DE, rank_E < size_D.unsqueeze(1))
    return _within(scores, rule, in_pool_DE[document_T], bias_E)


def pool_sizes(count: int, sizes: tuple[int, int], draw: Draw, device: torch.device) -> Tensor:
    """P of the first, second, ... document of a row: int64 [count]."""
    key = mix(KEY, draw.seed, draw.step, draw.layer)
    return sizes[0] + uniform_bits(count, key, device) % (sizes[1] - sizes[0] + 1)


def _within(scores: Scores, rule: ScoreRule, allowed_TE: Tensor, bias_E: Tensor | None) -> Scores:
    raw_TE = scores.raw_TE * allowed_TE
    total_T1 = raw_TE.sum(1, keepdim=True)
    probs_TE, log_z_T = raw_TE / (total_T1 + LEAST_SUM), scores.log_z_T
    if rule.function == "softmax":
        # Of the experts in the pool alone: p divided by their sum, log Z plus its logarithm.
        raw_TE, log_z_T = probs_TE, log_z_T + (total_T1 + LEAST_SUM).log().squeeze(1)
    ranking_TE = raw_TE.detach()
    plain_TK = best(ranking_TE.masked_fill(~allowed_TE, -torch.inf), rule.topk)
    choices_TK = plain_TK
    if bias_E is not None:
        choices_TK = best((ranking_TE + bias_E).masked_fill(~allowed_TE, -torch.inf), rule.topk)
    least = torch.finfo(probs_TE.dtype).tiny
    return replace(
        scores,
        log_probs_TE=probs_TE.detach().clamp(min=least).log(),
        log_z_T=log_z_T,
        probs_TE=probs_TE,
        choices_TK=choices_TK,
        weights_TK=rule.weights(raw_TE.gather(1, choices_TK)),
        scores_TE=None if rule.function == "softmax" else raw_TE,
        balance_TK=None if bias_E is None else plain_TK,
    )
