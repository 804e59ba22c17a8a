"""Which choices of a group find a slot: the four drop policies, written from their definitions.

Independent of `megatron_moe.moe`, which is tested against it; `docs/routing.md` has the
definitions.

Shapes: G capacity groups of T tokens, K choices per token, E experts, A = K T choices of a group.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES = ("position", "probs", "random", "fair")
"""Values of `--moe-token-drop-policy` that the reference model has."""


def kept_choices(
    ids_GTK: Tensor,
    probs_GTK: Tensor,
    num_experts: int,
    slots: int,
    policy: str,
    *,
    layer: int = 0,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Which choices get one of their expert's slots, [G, T, K].

    The choices of a group form a queue: all first choices in token order, then all second choices
    (policy `position`), or by decreasing probability with ties in that order (`probs`), or as
    `position` with the tokens in an order drawn for each K (`random`). A choice is kept if and only
    if fewer than `slots` choices of the same expert precede it, kept or dropped. `fair` takes
    evenly spaced choices instead, see `fair_shares`.

    Example, 4 tokens, K = 2, 2 slots, policy `position`:

        token    choices (probability)      queue: first choices    second choices
        0        e0 (.50)  e1 (.30)         0: e0  kept             4: e1  kept
        1        e0 (.40)  e2 (.35)         1: e0  kept             5: e2  kept
        2        e0 (.60)  e1 (.20)         2: e0  dropped          6: e1  dropped
        3        e1 (.45)  e0 (.25)         3: e1  kept             7: e0  dropped

    Token 2 loses both choices, so its MoE output is zero. Token 3 precedes token 0's second choice
    although it is the later token: with a capacity, routing is not causal. Under `probs` token 2
    (.60) and token 0 (.50) get the slots of e0, and token 1 loses its first choice.

    Args:
        ids_GTK: chosen experts.
        probs_GTK: their weights.
        num_experts: E.
        slots: C.
        policy: of `POLICIES`.
        layer: index of the layer, for `random` and `fair`.
        seed: of the run, for `random`.
        step: of training, for `random` and `fair`; 0 in evaluation.
    """
    if policy == "fair":
        return fair_shares(ids_GTK, num_experts, slots, layer, step)
    groups, tokens, choices = ids_GTK.shape
    # [G, T, K] -> [G, K T]: choice-major order is the queue of policy `position`.
    ids_GA = ids_GTK.transpose(1, 2).reshape(groups, -1)
    probs_GA = probs_GTK.transpose(1, 2).reshape(groups, -1)
    queue_GA = torch.arange(choices * tokens, device=ids_GA.device).expand_as(ids_GA)
    if policy == "probs":
        queue_GA = probs_GA.argsort(dim=1, descending=True, stable=True)
    if policy == "random":
        numbers_KT = split_mix(seed, step, layer, count=choices * tokens).reshape(choices, tokens)
        order_KT = numbers_KT.argsort(axis=1, kind="stable")
        order_KT += np.arange(choices)[:, None] * tokens
        queue_GA = torch.from_numpy(order_KT.reshape(-1)).to(ids_GA.device).expand_as(ids_GA)
    queued_GA = ids_GA.gather(1, queue_GA)
    # The running count of each expert up to and including a place, at the expert of that place,
    # minus the choice itself: how many of the same expert precede it.
    so_far_GAE = F.one_hot(queued_GA, num_experts).cumsum(dim=1)
    before_GA = so_far_GAE.gather(2, queued_GA.unsqueeze(2)).squeeze(2) - 1
    kept_GA = torch.zeros_like(ids_GA, dtype=torch.bool).scatter(1, queue_GA, before_GA < slots)
    return kept_GA.view(groups, choices, tokens).transpose(1, 2)


def fair_shares(ids_GTK: Tensor, num_experts: int, slots: int, layer: int, step: int) -> Tensor:
    """Policy `fair`, [G, T, K]: of the m first choices of an expert, evenly spaced C.

    With C' of the slots C left for its m choices of rank k (m or fewer), number r of them in token
    order is kept if r C'/m + u/m' passes an integer at r + 1: (r C' + o) mod m >= m - C' with
    o = floor(m u). u is a number of the layer, k and the expert, plus the golden ratio per step.
    """
    _, _, choices = ids_GTK.shape
    starts_KE = np.stack([split_mix(layer, k, count=num_experts) for k in range(choices)])
    turns_KE = (starts_KE.astype(np.int64) + step * 2654435769) % 2**32
    kept_GTK = torch.zeros_like(ids_GTK, dtype=torch.bool)
    left_GE = torch.full((ids_GTK.shape[0], num_experts), slots, device=ids_GTK.device)
    for k in range(choices):
        chosen_GTE = F.one_hot(ids_GTK[:, :, k], num_experts)
        number_GTE, load_GE = chosen_GTE.cumsum(dim=1) - 1, chosen_GTE.sum(dim=1)
        share_GE = torch.minimum(left_GE, load_GE)
        offset_GE = torch.from_numpy(turns_KE[k]).to(ids_GTK.device) * load_GE // 2**32
        load_G1E, share_G1E = load_GE[:, None].clamp(min=1), share_GE[:, None]
        taken_GTE = (number_GTE * share_G1E + offset_GE[:, None]) % load_G1E
        kept_GTK[:, :, k] = ((taken_GTE >= load_G1E - share_G1E) & (chosen_GTE == 1)).any(dim=2)
        left_GE = left_GE - share_GE
    return kept_GTK


def split_mix(*key: int, count: int) -> np.ndarray:
    """``count`` numbers below 2^32 that a key of integers decides, int64.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the key is mixed into a seed integer by integer;
    from it on, each number is the upper half of the next of the generator's.
    """
    state = np.zeros(1, dtype=np.uint64)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    for part in key:
        state = _mixed((state ^ np.uint64(part)) + gamma)
    steps = np.arange(1, count + 1, dtype=np.uint64)
    return (_mixed(state + steps * gamma) >> np.uint64(32)).astype(np.int64)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
