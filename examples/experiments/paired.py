"""Statistics of paired experiments: intervals of differences, and corrections for their number.

Two variants are compared seed by seed: with one seed they have the same initial weights (where
shapes agree) and the same data in the same order, so that what a seed does to both cancels in the
difference. What is left, rounding that grows to other trajectories included, is the spread of the
differences, from which the interval follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of paired differences and what it allows to claim.

    Args:
        n: pairs.
        mean: of the differences.
        sd: their standard deviation, with n - 1.
        low, high: the 95% confidence interval of the mean, of Student's t with n - 1 degrees of
            freedom.
        p: two-sided p-value of the hypothesis that the mean is 0.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def paired(differences: Sequence[float], confidence: float = 0.95) -> Paired:
    """Student's t for paired differences.

    Example: differences 1, 2, 3 have mean 2, standard deviation 1 and standard error 0.577; with 2
    degrees of freedom the quantile is 4.303, so the interval is 2 - 2.484 to 2 + 2.484, and
    t = 3.464 has p = 0.0742.

    Args:
        differences: at least two.
        confidence: of the interval.
    """
    from scipy import stats

    n = len(differences)
    mean = math.fsum(differences) / n
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    if error > 0:
        p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    else:
        p = 1.0 if mean == 0 else 0.0
    return Paired(n=n, mean=mean, sd=sd, low=mean - half, high=mean + half, p=p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values that are corrected for the number of comparisons (Holm, 1979).

    The i-th smallest of m is multiplied by m - i + 1, and is at least the corrected one before it.
    With a limit of 0.05 the chance of one or more false claims in the whole family is at most 5%.

    Example: 0.01, 0.04, 0.03 become 0.03, 0.06, 0.06.

    Args:
        p_values: by the name of the comparison.

    Returns:
        The corrected ones under the same names, at most 1.
    """
    corrected, least = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        least = max(least, min(1.0, p_values[name] * (len(p_values) - place)))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def at_cost(curve: Sequence[tuple[float, float]], cost: float) -> float:
    """The loss of a recipe at another cost, between runs of it that differ in length.

    Linear in the logarithm of the cost between two neighbouring runs. Outside of the runs' costs
    it is extrapolated from the nearest two, which the caller must bound.

    Example: losses 3.0 and 2.9 at costs 1 and 4 give 2.95 at cost 2.

    Args:
        curve: pairs of cost and loss, at least two, each with its own schedule run to its end.
        cost: in the same unit, > 0.
    """
    points = sorted(curve)
    above = next((i for i, point in enumerate(points) if point[0] >= cost), len(points) - 1)
    high = max(above, 1)
    (c0, l0), (c1, l1) = points[high - 1], points[high]
    share = math.log(cost / c0) / math.log(c1 / c0)
    return l0 + share * (l1 - l0)
