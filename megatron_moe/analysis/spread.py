"""How unevenly the tokens of one id or one position are spread over the experts.

Shapes: C conditions (ids or positions), E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def spread(chosen_CE: Array) -> Array:
    """Standard deviation over the experts of each condition's shares of choices, [C].

    Shares add up to 1, so it is 0 for uniform routing; `fixed_experts` is the other extreme.
    """
    total_C1 = chosen_CE.sum(1, keepdims=True)
    share_CE = np.divide(
        chosen_CE, total_C1, out=np.full(chosen_CE.shape, np.nan), where=total_C1 > 0
    )
    return np.asarray(share_CE.std(1))


def fixed_experts(topk: int, experts: int) -> float:
    """The spread if the same K experts are always chosen: 0.121 for two of 32."""
    return float(np.sqrt(1 / (topk * experts) - 1 / experts**2))


def spread_by_chance(load_E: Array, tokens: int, topk: int, size_C: Array) -> Array:
    """Root mean square spread of conditions that do not matter, [C].

    The choices of n tokens that are drawn from all T: the count of an expert is hypergeometric, so
    its share of choices has variance pi (1 - pi) (T - n) / ((T - 1) n k^2), with pi the share of
    tokens that choose it; unequal loads add their own spread.

    Args:
        load_E: choices of each expert among all tokens.
        tokens: T.
        topk: k.
        size_C: tokens of each condition.
    """
    pi_E = load_E / tokens
    own = ((pi_E / topk - 1 / len(load_E)) ** 2).mean()
    rest = (tokens - size_C) / max(tokens - 1, 1)
    noise = (pi_E * (1 - pi_E)).mean() / topk**2
    sizes = np.where(size_C > 0, size_C, np.nan)
    return np.asarray(np.sqrt(own + noise * rest / sizes))


def beyond_chance(spread_C: Array, chance_C: Array) -> float:
    """Root of the mean squared spread above chance; 0 if there is none."""
    excess = np.nanmean(spread_C**2 - chance_C**2) if np.isfinite(spread_C).any() else np.nan
    return float(np.sqrt(max(excess, 0.0))) if np.isfinite(excess) else float("nan")
