"""Routing: which experts a token chooses, and which of its choices find a slot.

    z = x W_r,  s = softmax(z)              over all E experts, fp32; or sigmoid(z) of each
    choices = the K largest s, best first   combine weight = s; or s / sum of the K, times a factor
              (`choose`: biased, of groups)
    kept    = choice is among the first C of its expert in its group's queue (`queues.py`)

The routing half of the reference model, written from the definition and independent of
`megatron_moe.moe`, which is tested against it. Sources: Xue et al., OpenMoE (arXiv 2402.01739), and
its released training code; `docs/model.md` has the formulas.

Shapes: T tokens row by row, E experts, K choices per token, G capacity groups of T_g tokens,
A = K T_g choices of a group, R rows over which a balance loss is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.queues import POLICIES, kept_choices


@dataclass(frozen=True)
class Routing:
    """Routing decisions of one MoE layer for the T tokens of a micro-batch."""

    layer: int
    """Index of the layer in the network, from 0."""
    router_probs_TE: Tensor
    """Scores over all experts that sum to 1, fp32: a softmax, or sigmoids divided by their sum."""
    scores_TE: Tensor
    """Score of each expert, fp32, of which weights are made: that softmax, or the sigmoids."""
    ids_TK: Tensor
    """Chosen experts, best first; equal probabilities in the order of the experts."""
    probs_TK: Tensor
    """Combine weight of each choice; see `combine_weights`."""
    kept_TK: Tensor
    """Whether the choice found a slot."""
    counts_E: Tensor
    """Choices per expert before dropping, without those of padding that is ignored."""
    balance_losses: tuple[Tensor, ...]
    """Of each `--moe-router-load-balancing-type`: E sum_e f_e P_e, which is K when balanced; 0 for
    `none`. In evaluation `group_aux_loss` is taken per row, `global_aux_loss` per micro-batch."""
    z_loss: Tensor
    """Mean over tokens of logsumexp(router logits)^2; with `--moe-z-loss-over chosen` over the K
    logits of the choices."""
    preferred_E: Tensor
    """Choices per expert that balance losses count: without bias and groups."""

    @property
    def balance_loss(self) -> Tensor:
        """The first one."""
        return self.balance_losses[0]


def route(
    logits_TE: Tensor,
    rows: int,
    moe: MoEConfig,
    layer: int,
    *,
    training_capacity: bool,
    forced_TK: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_E: Tensor | None = None,
    earlier: Sequence[Tensor] = (),
    valid_T: Tensor | None = None,
) -> Routing:
    """Route the tokens of a micro-batch: scores, top-k, capacity.

    Args:
        logits_TE: router logits of a micro-batch of `rows` rows of equal length.
        rows: B.
        moe: the expert part of the configuration.
        layer: index of the layer, recorded in `Routing.layer`.
        training_capacity: the capacity factor of training rather than evaluation.
        forced_TK: experts that replace the K largest, e.g. of a trace; weights and slots follow
            from them as usual.
        seed: of the run, for drop policies that draw; 0 in evaluation.
        step: of training; likewise.
        bias_E: added to scores for the choices; `None` without.
        earlier: `Routing.preferred_E` of earlier micro-batches of the step, for `global_aux_loss`.
        valid_T: false for tokens that take no slots and count in no loss; `None` if there are none.

    Raises:
        UsageError: a router or drop policy that only the parallel model has.
    """
    fix = "the reference model has no other"
    if valid_T is None:
        valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    if moe.moe_router_type not in ROUTERS:
        raise UsageError("--moe-router-type", moe.moe_router_type, " or ".join(ROUTERS), fix)
    if moe.moe_token_drop_policy not in POLICIES:
        policy, expected = moe.moe_token_drop_policy, f"one of {', '.join(POLICIES)}"
        raise UsageError("--moe-token-drop-policy", policy, expected, fix)
    sigmoid = moe.moe_router_score_function == "sigmoid"
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
    probs_TE = scores_TE
    if sigmoid:
        probs_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + LEAST_SUM)
    ids_TK = choose(logits_TE, scores_TE, moe, bias_E) if forced_TK is None else forced_TK
    probs_TK = combine_weights(scores_TE.gather(1, ids_TK), moe)
    # The balance loss is of the scores alone: bias and groups count for the choices only.
    preferred_TK = ids_TK
    if forced_TK is None:
        preferred_TK = best(scores_TE, moe.moe_router_topk)
    z_logits = logits_TE if moe.moe_z_loss_over == "all" else logits_TE.gather(1, ids_TK)
    return Routing(
        layer=layer,
        router_probs_TE=probs_TE,
        scores_TE=scores_TE,
        ids_TK=ids_TK,
        probs_TK=probs_TK,
        kept_TK=_kept(
            ids_TK,
            probs_TK,
            valid_T,
            rows,
            moe,
            training_capacity,
            layer=layer,
            seed=seed,
            step=step,
        ),
        counts_E=ids_TK[valid_T].flatten().bincount(minlength=moe.num_experts),
        balance_losses=tuple(
            _balance(kind, probs_TE, preferred_TK, valid_T, rows, moe, training_capacity, earlier)
            for kind in moe.load_balancing_types
        ),
        z_loss=z_logits.logsumexp(dim=-1).square()[valid_T].sum() / valid_T.sum().clamp(min=1),
        preferred_E=preferred_TK[valid_T].flatten().bincount(minlength=moe.num_experts),
    )


ROUTERS = ("linear", "contextual", "token_hash", "norm")
"""Values of `--moe-router-type` that the reference model has."""
LEAST_SUM = 1e-20
"""Added to sums of scores before a division, as in Megatron-LM."""


def best(ranking_TE: Tensor, count: int) -> Tensor:
    """Ids of the largest entries of each row, best first.

    A stable sort rather than `topk`, whose order of equal values is not defined: ties go to the
    expert with the lower index on every device.
    """
    return ranking_TE.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def choose(
    logits_TE: Tensor, scores_TE: Tensor, moe: MoEConfig, bias_E: Tensor | None = None
) -> Tensor:
    """The K experts that a token chooses, [T, K], best first: of the largest score plus bias.

    With `--moe-router-group-topk` M only experts of the M best groups of consecutive experts can be
    chosen. A group is worth the sum of its K // M best scores, or logits where the softmax comes
    after the selection (Megatron-LM).
    """
    after = moe.moe_router_score_function == "softmax" and not moe.moe_router_pre_softmax
    if bias_E is not None:
        # An expert that an analysis leaves out has the logit -inf.
        ranking_TE = (scores_TE + bias_E).masked_fill(logits_TE == -math.inf, -math.inf)
    else:
        ranking_TE = logits_TE if after else scores_TE
    if moe.moe_router_group_topk is None or moe.moe_router_num_groups is None:
        return best(ranking_TE, moe.moe_router_topk)
    groups, size = moe.moe_router_num_groups, moe.num_experts // moe.moe_router_num_groups
    each = moe.moe_router_topk // moe.moe_router_group_topk
    worth_TG = torch.stack(
        [
            ranking_TE[:, g * size : (g + 1) * size].sort(dim=1, descending=True).values[:, :each]
            for g in range(groups)
        ],
        dim=1,
    ).sum(dim=2)
    kept_TM = best(worth_TG, moe.moe_router_group_topk)
    group_E = torch.arange(moe.num_experts, device=logits_TE.device) // size
    allowed_TE = (group_E == kept_TM.unsqueeze(2)).any(dim=1)
    return best(ranking_TE.masked_fill(~allowed_TE, -math.inf), moe.moe_router_topk)


def combine_weights(scores_TK: Tensor, moe: MoEConfig) -> Tensor:
    """Weights of the chosen experts, [T, K], from their scores among all experts."""
    if moe.moe_router_score_function == "sigmoid":
        normalised = moe.moe_router_topk > 1
    else:
        # Equal to a softmax over the K chosen logits alone: the normaliser over all E cancels.
        normalised = not moe.moe_router_pre_softmax
    if normalised:
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + LEAST_SUM)
    scale = moe.moe_router_topk_scaling_factor
    return scores_TK if scale is None else scores_TK * scale


def hashed_experts(tokens_BS: Tensor, moe: MoEConfig) -> Tensor:
    """The K experts of each token's id, [T, K] (`--moe-router-type token_hash`).

    Expert e of id i has the number (i E + e + 1) of a stream of SplitMix64, and the K smallest win.
    """
    table = {i: _drawn(i, moe) for i in tokens_BS.unique().tolist()}
    chosen = [table[i] for i in tokens_BS.flatten().tolist()]
    return torch.tensor(chosen, device=tokens_BS.device).view(-1, moe.moe_router_topk)


def in_pools(
    logits_BSE: Tensor,
    documents_BS: Tensor | None,
    moe: MoEConfig,
    key: tuple[int, int, int],
) -> Tensor:
    """Router logits with -inf outside of the pool of each document.

    The pool of a document is the P experts with the largest sums of scores over its tokens. P of
    the n-th document of a row is a function of n and the key.

    Args:
        logits_BSE: of all experts.
        documents_BS: number of each token's document within its row; `None`: each row is one.
        moe: with `moe_router_document_pool`.
        key: seed, step and layer.
    """
    assert moe.moe_router_document_pool is not None
    least, most = moe.moe_router_document_pool
    sigmoid = moe.moe_router_score_function == "sigmoid"
    scores_BSE = logits_BSE.sigmoid() if sigmoid else logits_BSE.softmax(dim=-1)
    if documents_BS is None:
        documents_BS = torch.zeros_like(logits_BSE[..., 0], dtype=torch.int64)
    start = 0
    for part in (2605_06663, *key):
        start = _finalised((start ^ part) + _GOLDEN)
    restricted_BSE = logits_BSE.clone()
    for row, numbers_S in enumerate(documents_BS):
        for number in numbers_S.unique().tolist():
            size = least + _number(number + 1, start) % (most - least + 1)
            own_S = numbers_S == number
            sums_1E = scores_BSE[row, own_S].sum(dim=0, keepdim=True)
            outside = best(sums_1E, moe.num_experts)[0, size:]
            restricted_BSE[row, own_S.nonzero(), outside] = -math.inf
    return restricted_BSE


_GOLDEN = 0x9E3779B97F4A7C15


def _finalised(z: int) -> int:
    """The finaliser of SplitMix64."""
    mask = (1 << 64) - 1
    z &= mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def _number(place: int, start: int) -> int:
    """The number below 2^32 at a place, from 1, of the stream that begins at ``start``."""
    return _finalised(place * _GOLDEN + start) >> 32


def _drawn(token: int, moe: MoEConfig) -> list[int]:
    start = _finalised(2106_04426 + _GOLDEN)
    places = range(token * moe.num_experts + 1, (token + 1) * moe.num_experts + 1)
    numbers = [_number(place, start) for place in places]
    return sorted(range(moe.num_experts), key=numbers.__getitem__)[: moe.moe_router_topk]


def full_precision(x: Tensor) -> Tensor:
    """fp32, or fp64 if it already is: the precision of norms, RoPE, router and logits."""
    return x if x.dtype == torch.float64 else x.float()


def capacity(moe: MoEConfig, group_tokens: int, *, training_capacity: bool) -> int:
    """Slots C of one expert for a group of T_g tokens.

    - `t5x` (released): max(round(cf T_g / E), C_min); halves round to even. Without a factor K.
    - `port`: floor(K cf T_g / E), rounded up to an even number, at least C_min.
    - `megatron` (Megatron-Core): ceil((K T_g / E) cf), without a minimum.
    - Without a capacity factor, T_g: a slot for every token.

    Example: T_g = 2048, E = 32, K = 2, cf = 1.25. `t5x` gives 80 slots, `port` 160. The group makes
    4096 choices, 128 per expert if balanced, so under `t5x` at least 37.5% of them are dropped.
    """
    factor = capacity_factor(moe, training_capacity)
    if factor is None:
        return group_tokens
    if moe.moe_capacity_rule == "megatron":
        # The order of the operations is Megatron-Core's, since ceil depends on the last bit.
        return math.ceil((moe.moe_router_topk * group_tokens / moe.num_experts) * factor)
    if moe.moe_capacity_rule == "t5x":
        # Python's round() rounds halves to even, as jnp.round does in the released code.
        slots = round(factor * group_tokens / moe.num_experts)
    else:
        slots = math.floor(moe.moe_router_topk * factor * group_tokens / moe.num_experts)
        slots += slots % 2
    return max(slots, moe.moe_min_capacity)


def capacity_group(moe: MoEConfig, batch: int, sequence: int) -> int:
    """Tokens T_g of one capacity group of a micro-batch of `batch` rows of `sequence` tokens.

    Raises:
        UsageError: the configured size neither divides a row nor consists of whole rows.
    """
    size = moe.moe_capacity_group_size
    if size is None:
        return sequence if moe.moe_capacity_rule == "t5x" else batch * sequence
    aligned = size >= 1 and (sequence % size == 0 or size % sequence == 0)
    if not aligned or (batch * sequence) % size:
        expected = f"a divisor of the row ({sequence}), or whole rows that divide {batch} rows"
        raise UsageError("--moe-capacity-group-size", size, expected)
    return size


def balance_loss(probs_RTE: Tensor, ids_RTK: Tensor, valid_RT: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e, averaged over R: f_e choices of e per token, P_e its mean probability.

    f_e counts all K choices before dropping, so sum_e f_e = K and the loss is K when balanced. It
    is an integer count per token without a gradient; gradients flow through P_e alone. Both are of
    valid tokens only, and the average is over the R that have any.
    """
    rows, _, experts = probs_RTE.shape
    losses = []
    for row in range(rows):
        probs_TE, ids_TK = probs_RTE[row], ids_RTK[row]
        if valid_RT is not None:
            probs_TE, ids_TK = probs_TE[valid_RT[row]], ids_TK[valid_RT[row]]
        if len(probs_TE):
            f_E = F.one_hot(ids_TK, experts).sum(dim=1).to(probs_TE.dtype).mean(dim=0)
            losses.append(experts * (f_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean() if losses else probs_RTE.sum() * 0.0


def capacity_factor(moe: MoEConfig, training_capacity: bool) -> float | None:
    """The capacity factor of training or evaluation; `None` means dropless."""
    return moe.moe_expert_capacity_factor if training_capacity else moe.moe_eval_capacity_factor


def _kept(
    ids_TK: Tensor,
    probs_TK: Tensor,
    valid_T: Tensor,
    rows: int,
    moe: MoEConfig,
    training_capacity: bool,
    **draw: int,
) -> Tensor:
    valid_TK = valid_T[:, None].expand_as(ids_TK)
    if capacity_factor(moe, training_capacity) is None:
        return valid_TK
    group = capacity_group(moe, rows, ids_TK.shape[0] // rows)
    # The others queue for an expert that does not exist.
    queued_TK = ids_TK.where(valid_TK, moe.num_experts)
    kept_GTK = kept_choices(
        queued_TK.unflatten(0, (-1, group)),
        probs_TK.unflatten(0, (-1, group)),
        moe.num_experts + 1,
        capacity(moe, group, training_capacity=training_capacity),
        moe.moe_token_drop_policy,
        **draw,
    )
    return kept_GTK.flatten(0, 1) & valid_TK


def _balance(
    kind: str,
    probs_TE: Tensor,
    ids_TK: Tensor,
    valid_T: Tensor,
    rows: int,
    moe: MoEConfig,
    training_capacity: bool,
    earlier: Sequence[Tensor],
) -> Tensor:
    if kind in ("none", "quantile_balancing"):
        return probs_TE.new_zeros(())
    if kind == "global_aux_loss":
        # f over the valid tokens of all micro-batches so far, P over those of this one.
        own_E = ids_TK[valid_T].flatten().bincount(minlength=moe.num_experts)
        load_E = torch.stack([*earlier, own_E]).sum(dim=0).to(probs_TE.dtype)
        f_E = load_E / (load_E.sum() / moe.moe_router_topk).clamp(min=1)
        p_E = probs_TE[valid_T].sum(dim=0) / valid_T.sum().clamp(min=1)
        return moe.num_experts * (f_E * p_E).sum()
    over = 1 if kind == "aux_loss" else rows
    # Texts that are evaluated have any length, which groups need not divide.
    if kind == "group_aux_loss" and training_capacity:
        tokens = probs_TE.shape[0]
        over = tokens // capacity_group(moe, rows, tokens // rows)
    return balance_loss(*(x.unflatten(0, (over, -1)) for x in (probs_TE, ids_TK, valid_T)))
