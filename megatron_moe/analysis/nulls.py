"""Chance levels: what a statistic would be if choices did not depend on what it looks at.

Shapes: T tokens of a pool, K choices, E experts, R draws, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Statistic = Callable[[Array], Array]
"""From the share of tokens that choose each expert, [..., E], to a value, [...]."""

_TOKENS_OF_DRAWS = 20_000
"""Tokens that are drawn for a size of group, at least: `draws` is lowered for large groups."""
_LARGEST = 16_384
"""Groups above this are treated as if they had this many tokens: by then noise is below 1%."""


def drawn_shares(
    pool_TK: Array, experts: int, tokens: int, draws: int, rng: np.random.Generator
) -> Array:
    """Shares of groups whose choices are those of tokens drawn from a pool, [R, E].

    The pool keeps what the model's choices are like apart from the group: the load of the experts
    and which of them go together.

    Args:
        pool_TK: choices of all tokens.
        experts: E.
        tokens: size of a group.
        draws: R.
        rng: source of randomness.
    """
    chosen = pool_TK[rng.integers(len(pool_TK), size=draws * tokens)].astype(np.int64)
    group = np.repeat(np.arange(draws), tokens * pool_TK.shape[1])
    counts = np.bincount(group * experts + chosen.reshape(-1), minlength=draws * experts)
    return counts.reshape(draws, experts) / tokens


def by_size(
    pool_TK: Array,
    experts: int,
    largest: int,
    statistic: Statistic,
    *,
    draws: int,
    rng: np.random.Generator,
) -> Callable[[Array], Array]:
    """Expected value of a statistic for groups drawn from a pool, as a function of their sizes.

    It is simulated for sizes 1 to 16 and then for each 1.2 times larger one, and interpolated.

    Args:
        pool_TK: choices of all tokens.
        experts: E.
        largest: size up to which it is needed.
        statistic: function of the shares.
        draws: groups drawn of each size.
        rng: source of randomness.

    Returns:
        From sizes, [V], each at least 1, to values, [V].
    """
    top = int(min(max(largest, 1), _LARGEST))
    steps = np.geomspace(16, max(top, 17), 2 + int(np.log(max(top, 17) / 16) / np.log(1.2)))
    grid = np.unique(np.concatenate([np.arange(1, 17), np.round(steps)]).astype(np.int64))
    grid = grid[grid <= top]
    values = []
    for tokens in grid.tolist():
        number = max(4, min(draws, _TOKENS_OF_DRAWS // tokens))
        shares = drawn_shares(pool_TK, experts, tokens, number, rng)
        values.append(float(np.mean(statistic(shares))))

    def at(sizes_V: Array) -> Array:
        return np.interp(np.log(np.clip(sizes_V, 1, top)), np.log(grid), values)

    return at


def uniform_loads(
    tokens: int, topk: int, experts: int, draws: int, rng: np.random.Generator
) -> Array:
    """Tokens of each expert under a router that chooses at random, [R, E], fp64.

    Each load is binomial and their sum is K T. Loads are drawn apart and then moved to that sum and
    spread so that their variance stays that of the binomial.
    """
    if topk == experts:
        return np.full((draws, experts), float(tokens))
    counts = rng.binomial(tokens, topk / experts, size=(draws, experts)).astype(np.float64)
    centred = counts - counts.mean(1, keepdims=True)
    return tokens * topk / experts + centred * np.sqrt(experts / (experts - 1))


def p_value(observed: float, drawn_R: Array) -> float:
    """Share of draws that reach the observed value, itself counted as one of them."""
    return float(((drawn_R >= observed).sum() + 1) / (len(drawn_R) + 1))


def entropy(shares: Array) -> Array:
    """Entropy in nats of the distribution over the last axis; it need not be normalised."""
    total = shares.sum(-1, keepdims=True)
    p = np.divide(shares, total, out=np.zeros_like(shares, dtype=np.float64), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(-1)


def gini(loads: Array) -> Array:
    """Gini coefficient over the last axis: 0 if all are equal, 1 - 1/E if one has everything."""
    ordered = np.sort(loads, -1)
    n = loads.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weights).sum(-1) / (n * ordered.sum(-1))


def independent_pairs(loads: Array, topk: int, rounds: int = 500) -> Array:
    """Pairs of experts that a router with these loads and no preference for pairs would choose.

    The symmetric matrix a_i a_j, with an empty diagonal, whose rows sum to (K - 1) times the loads:
    of all such matrices the one with the largest entropy. For equal loads it is the constant
    load (K - 1) / (E - 1).

    Args:
        loads: tokens of each expert, [..., E].
        topk: K.
        rounds: most rounds of the fixed-point iteration.

    Returns:
        [..., E, E].
    """
    target = (topk - 1) * loads.astype(np.float64)
    total = np.maximum(target.sum(-1, keepdims=True), 1e-300)
    a = target / np.sqrt(total)
    for _ in range(rounds):
        rest = a.sum(-1, keepdims=True) - a
        new = np.sqrt(a * np.divide(target, rest, out=np.zeros_like(a), where=rest > 0))
        done = np.allclose(new, a, rtol=1e-9, atol=0)
        a = new
        if done:
            break
    pairs = a[..., :, None] * a[..., None, :]
    return pairs * (1.0 - np.eye(loads.shape[-1]))
